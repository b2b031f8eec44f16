"""A node that is started before its Postgres waits for it, and works as soon as it is there and good for something."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import asyncpg
import pytest

from anynode.models.migrate import migrate
from anynode.server.dev.embedded_postgres import EmbeddedPostgres, embedded_postgres
from tests.agents.scripted import eventually
from tests.kit.harness import TERMINAL, NodeProcess, running_node, socket_to, sql, text_of, with_database

SCRAM = "local all all scram-sha-256\n"


class LatePostgres:
    """A Postgres that has been set up, and does not run."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        with self.running() as server:
            self.empty_url = server.url
            self.url = with_database(server.url, "migrated")
            asyncio.run(sql(server.url, "CREATE DATABASE migrated"))
            asyncio.run(migrate(self.url))

    def running(self) -> AbstractContextManager[EmbeddedPostgres]:
        """Run it, always at the same address."""
        return embedded_postgres(self._directory, settings={"fsync": "off"})


@pytest.fixture(scope="module")
def postgres() -> Iterator[LatePostgres]:
    directory = Path(tempfile.mkdtemp(prefix="anynode-"))
    try:
        yield LatePostgres(directory / "postgres")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def complaints(node: NodeProcess) -> list[str]:
    """The lines of its log that are no mere information."""
    return [line for line in node.log.read_text().splitlines() if " INFO " not in line]


async def test_a_node_without_postgres_says_so_and_works_as_soon_as_it_is_there(
    postgres: LatePostgres, tmp_path: Path
) -> None:
    with running_node(postgres.url, tmp_path, until="/livez") as node:
        status, body = node.get("/readyz")
        assert (status, "database_unavailable" in body) == (503, True)
        async with socket_to(node, "ada") as socket:
            message_id = await socket.ask("are you there?")
            [error] = await socket.until("error")
            assert (error["code"], error["retryable"]) == ("database_unavailable", True)
            [complaint] = complaints(node)
            assert "WARNING" in complaint
            assert "DATABASE_URL" in complaint
            with postgres.running():
                node.wait_until("/readyz")
                frames = await socket.answer("are you there?", message_id=message_id)
                assert text_of(frames) == "[1] are you there?"
                # More at once than the pool has connections.
                answers = await asyncio.gather(*(answer(node, f"user-{number}") for number in range(30)))
                assert answers == [f"[1] hello of user-{number}" for number in range(30)]
                assert node.stop() == 0
        assert complaints(node) == [complaint]


async def answer(node: NodeProcess, user: str) -> str:
    async with socket_to(node, user) as socket:
        return text_of(await socket.answer(f"hello of {user}"))


async def test_a_message_that_waits_is_answered_when_postgres_comes(postgres: LatePostgres, tmp_path: Path) -> None:
    with running_node(postgres.url, tmp_path, until="/livez") as node:
        async with socket_to(node, "grace") as socket:
            await socket.ask("early")
            with postgres.running():
                frames = await socket.until(*TERMINAL, "error")
                assert text_of(frames) == "[1] early"
                assert node.stop() == 0


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ("a schema that is behind", ("schema is behind", "0001_initial", "anynode migrate")),
        ("no such database", ("DATABASE_URL", "nowhere")),
        ("no such role", ("DATABASE_URL", "nobody")),
    ],
)
def test_what_it_finds_wrong_when_postgres_is_there_ends_it_in_one_line(
    postgres: LatePostgres, tmp_path: Path, found: str, words: tuple[str, ...]
) -> None:
    url = {
        "a schema that is behind": postgres.empty_url,
        "no such database": with_database(postgres.url, "nowhere"),
        "no such role": postgres.url.replace("anynode@", "nobody@"),
    }[found]
    with running_node(url, tmp_path, until="/livez") as node, postgres.running():
        assert node.process.wait(15) == 2
        warning, refusal = complaints(node)
        assert "WARNING" in warning
        assert refusal.startswith("anynode: ")
        for word in words:
            assert word in refusal


def test_a_wrong_password_is_refused_at_once(tmp_path: Path) -> None:
    directory = Path(tempfile.mkdtemp(prefix="anynode-"))
    try:
        with embedded_postgres(directory / "postgres") as server:
            (server.data_directory / "pg_hba.conf").write_text(SCRAM)
            asyncio.run(sql(server.url, "ALTER ROLE anynode PASSWORD 'right'"))
            asyncio.run(sql(server.url, "SELECT pg_reload_conf()"))
            asyncio.run(eventually(lambda: refuses(server.url)))
            url = server.url.replace("anynode@", "anynode:hunter2@")
            started = time.monotonic()
            with pytest.raises(AssertionError, match="password"), running_node(url, tmp_path, until="/livez") as node:
                pytest.fail(f"it runs: {node.log.read_text()}")
            assert time.monotonic() - started < 10
            [line] = next(tmp_path.glob("node-*.log")).read_text().splitlines()
            assert line.startswith("anynode: ")
            assert "hunter2" not in line
    finally:
        shutil.rmtree(directory, ignore_errors=True)


async def refuses(url: str) -> bool:
    """Whether the server wants a password by now."""
    try:
        await sql(url, "SELECT")
    except (asyncpg.PostgresError, asyncpg.InterfaceError):
        return True
    return False


def test_a_node_that_waits_for_postgres_can_be_stopped(postgres: LatePostgres, tmp_path: Path) -> None:
    with running_node(postgres.url, tmp_path, until="/livez") as node:
        assert node.stop(within_seconds=5) == 0
