"""The owner of a turn, as the database keeps it: what an owner may write, and what nobody may."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest

from anynode.models.admissions import read_history
from anynode.models.database import Database
from anynode.models.events import Ending, Entry, Event, NewMessage, delta_payload, ended_under, flush
from anynode.models.ids import uuid7
from anynode.models.queries import bind
from anynode.models.turns import News, release_leases, renew_leases, take_over, watch
from tests.agents.scripted import eventually
from tests.kit.harness import sql

STATE = "SELECT node, epoch, status, lease_expires_at FROM turns"
JOURNAL = "SELECT seq, type, epoch FROM events ORDER BY seq"


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    database = await Database.connect(database_url, pool_max=2)
    yield database
    await database.close()


@pytest.fixture
async def connection(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


async def admit(
    connection: asyncpg.Connection, message_id: str, *, node: str = "mine", conversation_id: uuid.UUID | None = None
) -> Any:
    """What the statement says to a message of Ada's; its lease lasts an hour."""
    sql, arguments, _ = bind(
        "admit",
        user_id="ada",
        conversation_id=conversation_id,
        new_conversation_id=uuid7(),
        title="title",
        message_id=uuid7(),
        client_message_id=message_id,
        content="hello",
        created_at=datetime.now(UTC),
        turn_id=uuid7(),
        node=node,
        lease_seconds=3600.0,
        message_created="{}",
        turn_started="{}",
        history_messages_max=10,
        limits=None,
    )
    (row,) = await connection.fetch(sql, *arguments)
    return row


@pytest.fixture
async def turn_id(connection: asyncpg.Connection) -> uuid.UUID:
    """A turn of the node `mine`, whose last seq is 2."""
    turn_id: uuid.UUID = (await admit(connection, "1"))["turn_id"]
    return turn_id


@pytest.fixture
async def lost_turn_id(database: Database, turn_id: uuid.UUID, database_url: str) -> uuid.UUID:
    """The turn after another node has taken it over: its epoch is 2, its last seq is 3."""
    await sql(database_url, "UPDATE turns SET lease_expires_at = clock_timestamp()")
    assert [taken.turn_id for taken in await take(database, "other")] == [turn_id]
    return turn_id


async def take(database: Database, node: str, conversation_id: uuid.UUID | None = None) -> Sequence[Any]:
    return await take_over(
        database,
        node=node,
        known=(),
        lease_seconds=3600,
        beat_seconds=1,
        limit=10,
        max_attempts=3,
        stands_up_to=["turn.tool_result"],
        within_seconds=5,
        on_sent=lambda: None,
        conversation_id=conversation_id,
    )


def entry_of(turn_id: uuid.UUID, epoch: int, said: str, first_seq: int) -> Entry:
    """What an owner has to say, so that it is written by the statement of that name."""
    events = [Event(first_seq, "turn.delta", str(turn_id), delta_payload("one"))]
    ending = None
    if said != "flush_one":
        type = "turn.delta" if said == "flush" else "turn.completed"
        events.append(Event(first_seq + 1, type, str(turn_id), delta_payload("two")))
    if said == "flush_with_endings":
        message = NewMessage(uuid7(), "ada", 1, "assistant", "one two", "completed", datetime.now(UTC))
        ending = Ending("completed", [message])
    return Entry(turn_id, epoch, events, ending)


FLUSHES = ("flush_one", "flush", "flush_with_endings")


@pytest.mark.parametrize("statement", FLUSHES)
async def test_an_owner_writes(database: Database, database_url: str, turn_id: uuid.UUID, statement: str) -> None:
    entry = entry_of(turn_id, 1, statement, 3)
    assert await flush(database, [entry], within_seconds=5) == set()
    rows = await sql(database_url, JOURNAL)
    assert [row["seq"] for row in rows] == [1, 2, *(event.seq for event in entry.events)]
    assert [row["status"] for row in await sql(database_url, STATE)] == ["completed" if entry.ending else "running"]


@pytest.mark.parametrize("first_seq", [3, 4], ids=["where-the-other-wrote", "behind-that"])
@pytest.mark.parametrize("statement", FLUSHES)
async def test_whoever_was_an_owner_is_refused_as_a_whole(
    database: Database, database_url: str, lost_turn_id: uuid.UUID, statement: str, first_seq: int
) -> None:
    before = await sql(database_url, STATE)
    entry = entry_of(lost_turn_id, 1, statement, first_seq)
    assert await flush(database, [entry], within_seconds=5) == {lost_turn_id}
    assert await ended_under(database, {lost_turn_id: 1}, within_seconds=5) == set()
    rows = await sql(database_url, JOURNAL)
    assert [tuple(row) for row in rows] == [(1, "message.created", 1), (2, "turn.started", 1), (3, "turn.restarted", 2)]
    assert await sql(database_url, STATE) == before
    assert [row["role"] for row in await sql(database_url, "SELECT role FROM messages")] == ["user"]


@pytest.mark.parametrize("statement", FLUSHES)
async def test_a_flush_that_is_repeated_writes_nothing_twice(
    database: Database, database_url: str, turn_id: uuid.UUID, statement: str
) -> None:
    entry = entry_of(turn_id, 1, statement, 3)
    await flush(database, [entry], within_seconds=5)
    before = await sql(database_url, JOURNAL)
    if await flush(database, [entry], within_seconds=5):  # refused because it is over; but that is its own doing
        assert await ended_under(database, {turn_id: 1}, within_seconds=5) == {turn_id}
    assert await sql(database_url, JOURNAL) == before


async def test_whoever_was_an_owner_renews_nothing_and_is_told(
    database: Database, database_url: str, lost_turn_id: uuid.UUID
) -> None:
    before = await sql(database_url, STATE)
    assert await renew_leases(database, {lost_turn_id: 1}, lease_seconds=9, within_seconds=5) == {}
    assert await sql(database_url, STATE) == before
    assert await renew_leases(database, {lost_turn_id: 2}, lease_seconds=9, within_seconds=5) == {lost_turn_id: False}


async def test_whoever_was_an_owner_hands_nothing_over(
    database: Database, database_url: str, lost_turn_id: uuid.UUID
) -> None:
    before = await sql(database_url, STATE)
    await release_leases(database, {lost_turn_id: 1})
    assert await sql(database_url, STATE) == before
    await release_leases(database, {lost_turn_id: 2})
    assert [taken.epoch for taken in await take(database, "third")] == [3]


async def test_a_turn_that_is_being_taken_over_is_left_to_who_takes_it(
    database: Database, connection: asyncpg.Connection, turn_id: uuid.UUID
) -> None:
    await connection.execute("UPDATE turns SET lease_expires_at = clock_timestamp()")
    async with connection.transaction():
        lapsed = bind(
            "take_over",
            node="third",
            known=[],
            lease_seconds=3600.0,
            turns_max=10,
            attempts_max=3,
            stands_up_to=[],
            two_beats_seconds=2.0,
            conversation_id=None,
        )
        taken = await connection.fetch(lapsed.sql, *lapsed.arguments)
        assert [row["turn_id"] for row in taken] == [turn_id]
        assert await take(database, "other") == []
    assert await take(database, "other") == []


async def test_each_node_that_takes_a_stores_turn_is_told_that_its_agent_is_gone(
    database: Database, connection: asyncpg.Connection
) -> None:
    await admit(connection, "1", node="store:application")
    for epoch, node in enumerate(("one", "two"), 2):  # the first one may have died before it ended the turn
        await connection.execute("UPDATE turns SET lease_expires_at = clock_timestamp()")
        (taken,) = await take(database, node)
        assert (taken.epoch, taken.agent_is_gone) == (epoch, True)
    await connection.execute("UPDATE turns SET lease_expires_at = clock_timestamp()")
    (taken,) = await take(database, "store:another")
    assert not taken.agent_is_gone


async def test_for_one_conversation_only_a_stores_turn_in_it_is_taken(
    database: Database, connection: asyncpg.Connection
) -> None:
    of_a_node = await admit(connection, "1")
    of_a_store, other = [await admit(connection, id, node=f"store:{id}") for id in ("2", "3")]
    assert await take(database, "store:mine", of_a_store["conversation_id"]) == []  # its lease holds
    await connection.execute("UPDATE turns SET lease_expires_at = clock_timestamp()")
    assert await take(database, "store:mine", of_a_node["conversation_id"]) == []
    taken = await take(database, "store:mine", of_a_store["conversation_id"])
    assert [each.turn_id for each in taken] == [of_a_store["turn_id"]]
    assert {each.turn_id for each in await take(database, "node")} == {of_a_node["turn_id"], other["turn_id"]}


@pytest.mark.usefixtures("turn_id")  # a known user is not inserted; one transaction would wait
@pytest.mark.parametrize("is_new", [True, False], ids=["new", "existing"])
async def test_a_message_that_two_nodes_admit_at_the_same_instant_is_admitted_once(
    connection: asyncpg.Connection, database_url: str, *, is_new: bool
) -> None:
    conversation_id = None
    if not is_new:
        await connection.execute("UPDATE turns SET status = 'completed'")
        await connection.execute("UPDATE messages SET role = 'assistant'")
        conversation_id = await connection.fetchval("SELECT id FROM conversations")
    early = await asyncpg.connect(database_url)
    try:
        transaction = early.transaction()
        await transaction.start()
        one = await admit(early, "at once", conversation_id=conversation_id)
        waiting = asyncio.create_task(admit(connection, "at once", conversation_id=conversation_id))

        async def is_waiting() -> object:
            return await sql(database_url, "SELECT FROM pg_locks WHERE NOT granted")

        await eventually(is_waiting)
        await transaction.commit()
        other = await waiting
    finally:
        await early.close()
    assert (one["outcome"], other["outcome"]) == ("admitted", "repeated")
    assert [other[name] for name in SAME] == [one[name] for name in SAME]


SAME = ("conversation_id", "turn_id", "first_seq")


async def test_a_conversation_has_one_running_turn_whoever_inserts_another(
    connection: asyncpg.Connection, turn_id: uuid.UUID
) -> None:
    statement = """
        INSERT INTO turns (id, conversation_id, status, node, epoch, lease_expires_at)
        SELECT $1, conversation_id, $2, 'other', 1, clock_timestamp() FROM turns WHERE id = $3
    """
    with pytest.raises(asyncpg.UniqueViolationError, match="turns_running"):
        await connection.execute(statement, uuid7(), "running", turn_id)
    await connection.execute(statement, uuid7(), "completed", turn_id)


@pytest.mark.parametrize(("column", "index"), [("client_id", "messages_client_id"), ("position", "messages_position")])
async def test_a_message_id_and_a_position_are_there_once_whoever_inserts_another(
    connection: asyncpg.Connection, turn_id: uuid.UUID, column: str, index: str
) -> None:
    values = {"client_id": "'2'", "position": "position + 1"}
    same = {**values, column: column}
    with pytest.raises(asyncpg.UniqueViolationError, match=index):
        await connection.execute(COPY.format(**same), uuid7(), turn_id)
    await connection.execute(COPY.format(**values), uuid7(), turn_id)


COPY = """
    INSERT INTO messages (id, conversation_id, user_id, client_id, position, role, content)
    SELECT $1, conversation_id, user_id, {client_id}, {position}, role, content FROM messages WHERE turn_id = $2
"""


@pytest.mark.usefixtures("turn_id")  # a known user is not inserted; one transaction would wait
async def test_a_watch_misses_no_turn_that_began_before_others_and_committed_after_them(
    database: Database, connection: asyncpg.Connection, database_url: str
) -> None:
    async def hear(since: News | None) -> News:
        horizon = None if since is None else since.horizon
        return await watch(database, node="other", since=horizon, limit=10, within_seconds=5)

    first = await hear(None)
    early = await asyncpg.connect(database_url)
    try:
        async with early.transaction():
            slow = (await admit(early, "slow"))["conversation_id"]
            quick = (await admit(connection, "quick"))["conversation_id"]
            second = await hear(first)
            assert quick in second.begun  # and maybe others: transactions of other databases hold back the horizon, too
            assert slow not in second.begun
        assert slow in (await hear(second)).begun
    finally:
        await early.close()


async def test_the_history_of_a_deleted_conversation_is_none_and_not_an_empty_one(database: Database) -> None:
    assert await read_history(database, uuid.uuid4(), messages_max=10) is None
