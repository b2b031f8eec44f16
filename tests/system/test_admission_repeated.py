"""An admission whose connection breaks while it commits is repeated and meets its first attempt: it counts once."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator

import asyncpg
import pytest

from tests.agents.scripted import Strings, eventually, script_of
from tests.kit.exactness import Client, assert_exact
from tests.kit.harness import TERMINAL, Frame, NodeProcess, running_node, socket_to, sql
from tests.kit.postgres_proxy import PostgresProxy, postgres_proxy

QUESTION = script_of(("text", "begun in {attempt} "), ("text", "ended in {attempt}"))

# A transaction that has begun a turn waits at its commit while the test holds the lock.
WAITING_COMMITS = """
CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql
    AS 'BEGIN PERFORM pg_advisory_xact_lock_shared(1); RETURN NULL; END';
CREATE CONSTRAINT TRIGGER wait AFTER INSERT ON turns DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION wait();
"""
WAITING = """
SELECT pid, wait_event = 'advisory' AS is_committing FROM pg_stat_activity
WHERE datname = current_database() AND application_name = 'anynode' AND wait_event_type = 'Lock'
ORDER BY is_committing DESC
"""


@pytest.fixture(scope="module")
def proxy(module_database_url: str) -> Iterator[PostgresProxy]:
    async def prepare() -> None:
        connection = await asyncpg.connect(module_database_url)
        await connection.execute(WAITING_COMMITS)
        await connection.close()

    asyncio.run(prepare())
    with postgres_proxy(module_database_url) as running:
        yield running


@pytest.fixture(scope="module")
def node(proxy: PostgresProxy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    strings = Strings(tmp_path_factory.mktemp("strings"))
    environment = {**strings.environment, "LEASE_SECONDS": "300"}
    with running_node(proxy.url, tmp_path_factory.mktemp("node"), environment) as running:
        yield running


@pytest.fixture
async def committing(module_database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection of the test's own that can hold up commits."""
    connection = await asyncpg.connect(module_database_url)
    yield connection
    await connection.close()


async def repeat_while_it_commits(
    connection: asyncpg.Connection, proxy: PostgresProxy, statement: str, *, fails: bool
) -> None:
    """Cut off the admission that waits at its commit; when it has been repeated, and waits for itself, let go, or end
    the first attempt."""

    async def is_committing() -> bool:
        return [row["is_committing"] for row in await connection.fetch(WAITING)] == [True]

    async def waits_for_itself() -> bool:
        return [row["is_committing"] for row in await connection.fetch(WAITING)] == [True, False]

    await eventually(is_committing)
    executions = proxy.executions(statement)
    proxy.cut()
    proxy.heal()
    await eventually(waits_for_itself)
    assert proxy.executions(statement) == executions + 1
    if fails:
        first = (await connection.fetch(WAITING))[0]["pid"]
        await connection.execute("SELECT pg_terminate_backend($1)", first)
    await connection.execute("SELECT pg_advisory_unlock(1)")


@pytest.mark.parametrize("fails", [False, True], ids=["it commits", "it fails"])
async def test_a_first_message(
    node: NodeProcess,
    module_database_url: str,
    proxy: PostgresProxy,
    committing: asyncpg.Connection,
    user: str,
    *,
    fails: bool,
) -> None:
    client = Client(user, QUESTION)
    await committing.execute("SELECT pg_advisory_lock(1)")
    async with asyncio.TaskGroup() as group:
        group.create_task(client.watch(node))
        await repeat_while_it_commits(committing, proxy, "admit", fails=fails)
    assert client.errors == []
    await assert_exact(module_database_url, [client], epoch=1, text="begun in 1 ended in 1")
    assert len(await sql(module_database_url, "SELECT FROM conversations WHERE user_id = $1", user)) == 1


@pytest.mark.parametrize("fails", [False, True], ids=["it commits", "it fails"])
@pytest.mark.parametrize("statement", ["admit", "regenerate"])
async def test_a_later_message_and_a_question_that_is_answered_again(
    node: NodeProcess,
    module_database_url: str,
    proxy: PostgresProxy,
    committing: asyncpg.Connection,
    user: str,
    statement: str,
    *,
    fails: bool,
) -> None:
    async with socket_to(node, user) as socket:
        first = await socket.answer(QUESTION)
        conversation_id = first[0]["conversation_id"]
        again: Frame = {"type": "turn.regenerate", "conversation_id": conversation_id}
        message: Frame = {"type": "message.send", "message_id": user, "content": QUESTION}
        await committing.execute("SELECT pg_advisory_lock(1)")
        await socket.send(again if statement == "regenerate" else {**message, "conversation_id": conversation_id})
        await repeat_while_it_commits(committing, proxy, statement, fails=fails)
        frames = await socket.until(*TERMINAL, "error")
    expected = ["turn.started", "turn.delta", "turn.completed"]
    if statement == "admit":
        expected.insert(0, "message.created")
    types = [frame["type"] for frame in frames]
    assert [type for type, before in zip(types, [None, *types], strict=False) if type != before] == expected
    assert frames[0]["seq"] == first[-1]["seq"] + 1
    assert frames[-1]["message"]["content"] == "begun in 1 ended in 1"
    messages = await sql(
        module_database_url,
        "SELECT role, status FROM messages WHERE conversation_id = $1 ORDER BY position",
        uuid.UUID(conversation_id),
    )
    assert [tuple(message) for message in messages] == (
        [*[("user", "completed"), ("assistant", "completed")] * 2]
        if statement == "admit"
        else [("user", "completed"), ("assistant", "superseded"), ("assistant", "completed")]
    )
    turns = await sql(
        module_database_url, "SELECT status, epoch FROM turns WHERE conversation_id = $1", uuid.UUID(conversation_id)
    )
    assert [tuple(turn) for turn in turns] == [("completed", 1)] * 2
