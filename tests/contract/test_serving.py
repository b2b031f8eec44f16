"""Serving needs nothing of `anynode dev`: no module of it is loaded where a node is served."""

from __future__ import annotations

import subprocess
import sys

import pytest

LOADED = """
import sys
from anynode.server import app, cli, serve
sys.argv = ["anynode", *sys.argv[1:]]
try:
    cli.main()
finally:
    print(*[name for name in sys.modules if name.startswith("anynode.server.dev")], file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", [("serve", "--help"), ("migrate", "--help"), ("--version",)])
def test_serving_loads_no_module_of_dev(arguments: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-c", LOADED, *arguments], capture_output=True, text=True, check=True)
    assert done.stderr == "\n"


def test_dev_loads_its_own_modules_when_it_runs() -> None:
    """Otherwise the test above would prove nothing."""
    run = [sys.executable, "-c", LOADED, "dev", "--nodes", "1", "--data-dir", "/dev/null/nowhere"]
    done = subprocess.run(run, capture_output=True, text=True, check=False, env={"AGENT": "no_such_module:answer"})
    assert "anynode.server.dev.run" in done.stderr.splitlines()[-1].split()
