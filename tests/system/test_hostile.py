"""`make hostile` works: it attacks a node, prints the figures, and exits with 1 for a broken bound."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.kit.repository import TOP


def test_a_broken_bound_is_named_and_makes_the_status_1(tmp_path: Path) -> None:
    # The delays and the memory are those of a busy machine, and no log has fewer than 0 tracebacks.
    bounds = ("first token p99 beside alone, ms=1e9", "RSS growth, MB=1e9", "tracebacks=-1")
    done = subprocess.run(
        [sys.executable, "-m", "bench.hostile", "--quick", "malformed_http", *(f"--bound={bound}" for bound in bounds)],
        cwd=TOP,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "BROKEN: tracebacks 0 > -1\n" in done.stdout, done.stdout + done.stderr
    assert "[1/1]" in done.stderr
    assert done.stderr.endswith("Error: bounds are broken under: malformed_http\n")
    assert done.returncode == 1
    assert list(tmp_path.glob("anynode-hostile-*")) == []
