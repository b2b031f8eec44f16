"""The password of a node's role changes under it; and what the log says of what Postgres refuses."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from anynode.models.migrate import migrate
from anynode.server.dev.embedded_postgres import embedded_postgres
from tests.agents.scripted import eventually
from tests.kit.harness import NodeProcess, running_node, socket_to, sql, text_of

# The node's role needs its password; the tests' own does not.
RULES = "local all node scram-sha-256\nlocal all all trust\n"
TERMINATE = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'node'"
CANARY = "canary"


@pytest.fixture(scope="module")
def admin_url() -> Iterator[str]:
    """A Postgres of its own with a role `node`, as its superuser."""
    directory = Path(tempfile.mkdtemp(prefix="anynode-"))
    try:
        with embedded_postgres(directory / "postgres", settings={"fsync": "off"}) as server:
            asyncio.run(migrate(server.url))
            asyncio.run(sql(server.url, "CREATE ROLE node LOGIN SUPERUSER PASSWORD 'first'"))
            (server.data_directory / "pg_hba.conf").write_text(RULES)
            asyncio.run(sql(server.url, "SELECT pg_reload_conf()"))
            asyncio.run(eventually(lambda: wants_a_password(url_with("wrong", server.url))))
            yield server.url
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def node(admin_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A node that connects as that role."""
    with running_node(url_with("first", admin_url), tmp_path_factory.mktemp("node")) as node:
        yield node


def url_with(password: str, admin_url: str) -> str:
    return admin_url.replace("anynode@", f"node:{password}@")


async def wants_a_password(url: str) -> bool:
    try:
        await sql(url, "SELECT")
    except asyncpg.InvalidPasswordError:
        return True
    return False


async def test_a_changed_password_makes_a_node_unavailable_until_it_is_the_old_one_again(
    admin_url: str, node: NodeProcess
) -> None:
    async def is_away() -> bool:
        return node.get("/readyz")[0] == 503

    async with socket_to(node) as socket:
        assert text_of(await socket.answer("before")) == "[1] before"
        await sql(admin_url, "ALTER ROLE node PASSWORD 'second'")
        await sql(admin_url, TERMINATE)
        await eventually(is_away)
        assert "database_unavailable" in node.get("/readyz")[1]
        status, body = await asyncio.to_thread(node.get, "/conversations", user="ada")
        assert (status, "database_unavailable" in body) == (503, True)
        assert node.get("/livez")[0] == 200
        await sql(admin_url, "ALTER ROLE node PASSWORD 'first'")
        await asyncio.to_thread(node.wait_until, "/readyz")
        assert text_of(await socket.answer("after")) == "[1] after"
    log = node.log.read_text()
    refused = [line for line in log.splitlines() if "password authentication failed" in line]
    assert len(refused) == 1
    assert "WARNING" in refused[0]
    assert "Traceback" not in log


async def test_a_row_that_postgres_refuses_is_not_in_the_log(admin_url: str, node: NodeProcess) -> None:
    rule = f"CHECK (content NOT LIKE '%{CANARY}%')"
    await sql(admin_url, f"ALTER TABLE messages ADD CONSTRAINT no_bird {rule}")
    try:
        async with socket_to(node) as socket:
            await socket.ask(f"my {CANARY}")
            assert await socket.closed() == 1011
    finally:
        await sql(admin_url, "ALTER TABLE messages DROP CONSTRAINT no_bird")
    log = node.log.read_text()
    assert "SQLSTATE 23514, table messages, constraint no_bird" in log
    assert CANARY not in log
