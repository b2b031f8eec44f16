"""`make hostile` works: it attacks a node, prints the figures, and exits with 1 for a broken bound."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.kit.repository import TOP


def test_a_broken_bound_is_named_and_makes_the_status_1(tmp_path: Path) -> None:
    # The delays are those of a busy machine, and the cookies break a bound that nothing can keep.
    bounds = ("first token p99 beside alone, ms=1e9", "RSS growth, MB=1e9", "without an answer=-1")
    done = subprocess.run(
        [sys.executable, "-m", "bench.hostile", "--quick", "malformed_http", "cookies"]
        + [f"--bound={bound}" for bound in bounds],
        cwd=TOP,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    verdicts = [line.strip() for line in done.stdout.splitlines() if line.strip().startswith(("holds", "BROKEN"))]
    assert verdicts[0] == "holds", done.stdout + done.stderr
    assert verdicts[1].startswith("BROKEN: without an answer ")
    assert done.stderr.endswith("Error: bounds are broken under: cookies\n")
    assert done.returncode == 1
    assert list(tmp_path.glob("anynode-hostile-*")) == []
