"""The command `anynode` as people run it, with nothing of the test's own environment."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.kit.harness import SECRET

REPOSITORY = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "anynode.server.cli"]
INHERITED = ("PATH", "HOME", "LANG")


def environment(**settings: str) -> dict[str, str]:
    """Return an environment with these settings and what any process needs."""
    inherited = {name: os.environ[name] for name in INHERITED if name in os.environ}
    return {**inherited, "PYTHONPATH": str(REPOSITORY), **settings}


def anynode(*arguments: str, stdin: str = "", **settings: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [*COMMAND, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(**settings),
        cwd=REPOSITORY,
        check=False,
    )


def wait_until(condition: Callable[[], Any], within_seconds: float = 30.0) -> Any:
    """Wait until a condition that only the outside can show holds; return its value."""
    deadline = time.monotonic() + within_seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)
    return result


# Settings with which `anynode serve` starts once it is given a DATABASE_URL.
GOOD = {"JWT_SECRET": SECRET, "HOST": "127.0.0.1", "PORT": "0"}


def assert_refused_in_one_line(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """The command failed as one that was used wrongly does, with one line that holds these words."""
    assert result.returncode == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr
