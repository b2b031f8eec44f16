"""The installed package, in folders of people who have modules of their own by any name."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from tests.kit.harness import SECRET, free_port
from tests.kit.wheels import installed, package_around, uv_build

pytestmark = pytest.mark.slow
READY_SECONDS: Final = 30.0
OWN: Final = {
    "server.py": "greeting = 'Hello'\n",
    "agents.py": """
from collections.abc import AsyncIterator

import models
import server
from models import User

from anynode import AgentEvent, TextDelta, Turn


async def answer(turn: Turn) -> AsyncIterator[AgentEvent]:
    from server import greeting  # also while it runs

    assert models.User is User and server.greeting == greeting
    yield TextDelta(f"{greeting}, {User(turn.user_id).name}!")
""",
    "tools.py": """
from models import User

from anynode import ToolContext


def name(context: ToolContext) -> str:
    '''Return the user's name.'''
    return User(context.user_id).name


tools = [name]
""",
}
MODELS: Final = """
class User:
    def __init__(self, name: str) -> None:
        self.name = name
"""
AGENT: Final = """
from collections.abc import AsyncIterator

from anynode import AgentEvent, TextDelta, Turn, continues


@continues
async def answer(turn: Turn) -> AsyncIterator[AgentEvent]:
    yield TextDelta(turn.history[-1].content)
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with nothing but Anynode, installed from its wheel."""
    top = tmp_path_factory.mktemp("installed")
    root = top / "root"
    root.mkdir()
    return installed(uv_build(package_around(root), to=top / "wheel", is_skipped=True), top / "environment")


@pytest.fixture(params=["models.py", "models/__init__.py"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, programs: Path) -> Path:
    """A folder with an agent, its tools, and the modules of an application that has nothing to do with Anynode.

    For each module of the standard library, of Anynode and of what it depends on, there is one more file of its name.
    If Python runs such a file, it fails.
    """
    folder = tmp_path / "application"
    (folder / request.param).parent.mkdir(parents=True)
    (site,) = programs.parent.glob("lib/python*/site-packages")
    others = {path.name.partition(".")[0] for path in site.iterdir() if not path.name.endswith(".dist-info")}
    assert {"anynode", "click", "starlette", "uvloop", "websockets"} <= others
    for name in filter(str.isidentifier, others | sys.stdlib_module_names):
        (folder / f"{name}.py").write_text(f"raise RuntimeError('the {name} of the current folder runs')\n")
    for name, code in {**OWN, request.param: MODELS}.items():
        (folder / name).write_text(code)
    return folder


def environment(database_url: str, **settings: str) -> dict[str, str]:
    """Return settings with an agent and its tools, and the variables that any process needs."""
    inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    named = {"AGENT": "agents:answer", "TOOLS": "tools:tools"}
    return {**inherited, "HOST": "127.0.0.1", "DATABASE_URL": database_url, "JWT_SECRET": SECRET, **named, **settings}


def run(folder: Path, settings: Mapping[str, str], *command: str | Path, stdin: str = "") -> str:
    """Run a command in a folder to its end; returns what it prints."""
    done = subprocess.run(
        command, cwd=folder, env=settings, input=stdin, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def started(folder: Path, settings: Mapping[str, str], says: str, *command: str | Path) -> Iterator[None]:
    """A command that runs in a folder, from when it has said something until it is stopped."""
    log = folder.parent / f"log-{secrets.token_hex(4)}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=settings, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        deadline = time.monotonic() + READY_SECONDS
        while says not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        yield
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, log.read_text()
        assert "Traceback" not in log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def test_dev_runs_an_agent_that_lies_beside_modules_of_any_name(
    database_url: str, folder: Path, programs: Path
) -> None:
    settings = environment(database_url, PORT=str(free_port()))
    data = ("--data-dir", folder.parent / "data")
    with started(folder, settings, "Ctrl-C stops everything", programs / "anynode", "dev", *data):
        said = run(folder, settings, programs / "anynode", "chat", *data, stdin="Who am I?\n")
    assert said.strip() == "Hello, dev!"


def test_serve_runs_an_agent_that_lies_beside_modules_of_any_name(
    database_url: str, folder: Path, programs: Path
) -> None:
    settings = environment(database_url, PORT=str(free_port()))
    assert run(folder, settings, programs / "anynode", "migrate") == "the schema is up to date\n"
    token = run(folder, settings, programs / "anynode", "token", "--user", "ada").strip()
    with started(folder, settings, "Postgres is there", programs / "anynode", "serve"):
        said = run(folder, settings, programs / "anynode", "chat", "--token", token, stdin="Who am I?\n")
    assert said.strip() == "Hello, ada!"


def test_what_anynode_exports_has_types(programs: Path, tmp_path: Path) -> None:
    (tmp_path / "agent.py").write_text(AGENT)
    (tmp_path / "wrong.py").write_text(
        "from anynode import Client, Journal, TextDelta\nTextDelta(3)\nClient(3, 'token')\n"
    )
    options = ("--strict", "--no-incremental", "--python-executable", str(programs / "python"))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "agent.py", "wrong.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    found = [(line.partition(": ")[0], line.rpartition("  ")[2]) for line in done.stdout.splitlines()[:-1]]
    assert found == [
        ("wrong.py:1", "[attr-defined]"),
        ("wrong.py:2", "[arg-type]"),
        ("wrong.py:3", "[arg-type]"),
    ], done.stdout
