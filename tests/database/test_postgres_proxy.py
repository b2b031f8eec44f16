"""The proxy that other tests put before Postgres: what passes it, what it stops, and that it knows the statements."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator

import asyncpg
import pytest

from anynode.models.database import UNAVAILABLE
from anynode.models.queries import bind
from tests.agents.scripted import eventually
from tests.kit.harness import sql
from tests.kit.postgres_proxy import PostgresProxy, postgres_proxy

INSERT = "INSERT INTO users (id) VALUES ($1)"


@pytest.fixture
def proxy(module_database_url: str) -> Iterator[PostgresProxy]:
    with postgres_proxy(module_database_url) as running:
        yield running


@pytest.fixture
async def connection(proxy: PostgresProxy) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(proxy.url)
    yield connection
    connection.terminate()


async def list_conversations(connection: asyncpg.Connection) -> list[asyncpg.Record]:
    options = {"conversations_max": 10, "skip": 0, "search": None, "looked_at_max": 10, "bytes_max": 2**21}
    sql, arguments, _ = bind("list_conversations", user_id="somebody", **options)
    return await connection.fetch(sql, *arguments)


async def request_cancel(connection: asyncpg.Connection, user_id: str, conversation_id: uuid.UUID) -> str:
    sql, arguments, _ = bind("request_cancel", user_id=user_id, conversation_id=conversation_id, turn_id=None)
    found = await connection.fetch(sql, *arguments)
    return "done" if found else "not found"


async def make_running_turn(database_url: str, user: str) -> uuid.UUID:
    """A conversation whose turn runs nowhere."""
    conversation_id = uuid.uuid4()
    await sql(database_url, INSERT, user)
    await sql(database_url, "INSERT INTO conversations (id, user_id) VALUES ($1, $2)", conversation_id, user)
    statement = (
        "INSERT INTO turns (id, conversation_id, status, node, epoch, lease_expires_at, created_at) "
        "VALUES ($2, $1, 'running', 'none', 1, now(), now())"
    )
    await sql(database_url, statement, conversation_id, uuid.uuid4())
    return conversation_id


async def is_cancel_requested(database_url: str, conversation_id: uuid.UUID) -> bool:
    statement = "SELECT cancel_requested_at IS NOT NULL AS is_requested FROM turns WHERE conversation_id = $1"
    return bool((await sql(database_url, statement, conversation_id))[0]["is_requested"])


async def test_statements_of_any_size_pass_and_those_with_a_name_are_counted(
    proxy: PostgresProxy, connection: asyncpg.Connection
) -> None:
    assert await connection.fetchval("SELECT length($1)", "x" * 300_000) == 300_000
    assert await connection.fetchval("SELECT repeat('x', 300000)") == "x" * 300_000
    assert await connection.execute("SELECT 1; SELECT 2") == "SELECT 1"
    for _ in range(3):  # the first one prepares it
        assert await list_conversations(connection) == []
    assert proxy.executions("list_conversations") == 3
    assert proxy.executions("admit") == 0


async def test_errors_pass_and_what_follows_them_is_still_understood(
    proxy: PostgresProxy, connection: asyncpg.Connection
) -> None:
    with pytest.raises(asyncpg.UndefinedTableError):
        await connection.fetch("SELECT FROM nowhere")
    with pytest.raises(asyncpg.DivisionByZeroError):
        await connection.fetch("SELECT 1 / $1::integer", 0)
    hold = proxy.hold("after", "list_conversations")
    listing = asyncio.create_task(list_conversations(connection))
    await hold.reached()
    hold.release()
    assert await listing == []
    assert await connection.fetchval("SELECT 1") == 1


async def test_what_is_held_before_is_not_done_and_is_done_when_it_is_released(
    proxy: PostgresProxy, connection: asyncpg.Connection, module_database_url: str, user: str
) -> None:
    conversation_id = await make_running_turn(module_database_url, user)
    hold = proxy.hold("before", "request_cancel", nth=2)
    assert await request_cancel(connection, "nobody", conversation_id) == "not found"
    asking = asyncio.create_task(request_cancel(connection, user, conversation_id))
    await hold.reached()
    assert not await is_cancel_requested(module_database_url, conversation_id)
    async with asyncio.timeout(20):
        other = await asyncpg.connect(proxy.url)  # the others go on
        assert await list_conversations(other) == []
        await other.close()
    assert not asking.done()
    hold.release()
    assert await asking == "done"
    assert await is_cancel_requested(module_database_url, conversation_id)


async def test_what_is_held_before_is_never_done_when_who_asked_for_it_is_gone(
    proxy: PostgresProxy, module_database_url: str, user: str
) -> None:
    conversation_id = await make_running_turn(module_database_url, user)
    hold = proxy.hold("before", "request_cancel")
    connection = await asyncpg.connect(proxy.url)
    pid = connection.get_server_pid()
    asking = asyncio.create_task(request_cancel(connection, user, conversation_id))
    await hold.reached()
    connection.terminate()
    with pytest.raises(UNAVAILABLE):
        await asking

    async def is_gone() -> bool:
        return not await sql(module_database_url, "SELECT FROM pg_stat_activity WHERE pid = $1", pid)

    await eventually(is_gone)
    hold.release()
    assert not await is_cancel_requested(module_database_url, conversation_id)


async def test_what_is_held_after_is_committed_and_its_outcome_comes_when_it_is_released(
    proxy: PostgresProxy, connection: asyncpg.Connection, module_database_url: str, user: str
) -> None:
    conversation_id = await make_running_turn(module_database_url, user)
    hold = proxy.hold("after", "admit", "request_cancel")
    asking = asyncio.create_task(request_cancel(connection, user, conversation_id))
    await hold.reached()
    assert await is_cancel_requested(module_database_url, conversation_id)
    assert not asking.done()
    hold.release()
    assert await asking == "done"


async def test_a_cut_drops_connections_and_refuses_new_ones_until_it_is_healed(
    proxy: PostgresProxy, connection: asyncpg.Connection
) -> None:
    sleeping = asyncio.create_task(connection.fetch("SELECT pg_sleep(60)"))
    await asyncio.sleep(0)
    proxy.cut()
    with pytest.raises(UNAVAILABLE):
        await sleeping
    with pytest.raises(ConnectionRefusedError):
        await asyncpg.connect(proxy.url)
    proxy.heal()
    again = await asyncpg.connect(proxy.url)
    assert await again.fetchval("SELECT 1") == 1
    await again.close()


async def test_in_a_black_hole_everything_hangs_and_arrives_when_it_is_healed(
    proxy: PostgresProxy, connection: asyncpg.Connection, module_database_url: str, user: str
) -> None:
    conversation_id = await make_running_turn(module_database_url, user)
    proxy.black_hole()
    asking = asyncio.create_task(request_cancel(connection, user, conversation_id))
    connecting = asyncio.create_task(asyncpg.connect(proxy.url))
    done, _ = await asyncio.wait((asking, connecting), timeout=0.2)
    assert not done
    assert not await is_cancel_requested(module_database_url, conversation_id)
    proxy.heal()
    assert await asking == "done"
    await (await connecting).close()


async def test_what_a_connection_sent_into_a_black_hole_arrives_although_it_was_given_up(
    proxy: PostgresProxy, module_database_url: str, user: str
) -> None:
    conversation_id = await make_running_turn(module_database_url, user)
    connection = await asyncpg.connect(proxy.url)
    sql, arguments, _ = bind("request_cancel", user_id=user, conversation_id=conversation_id, turn_id=None)
    statement = await connection.prepare(sql)
    proxy.black_hole()
    asking = asyncio.create_task(statement.fetch(*arguments))
    await asyncio.wait((asking,), timeout=0.1)
    connection.terminate()
    with pytest.raises(UNAVAILABLE):
        await asking
    assert not await is_cancel_requested(module_database_url, conversation_id)
    proxy.heal()

    async def has_arrived() -> bool:
        return await is_cancel_requested(module_database_url, conversation_id)

    await eventually(has_arrived)
