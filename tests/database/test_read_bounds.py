"""What a client can cause to be read at once: 2 MiB, and two rows at least, however large the rows are."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator

import pytest

from anynode.models.admissions import read_history
from anynode.models.conversations import read_snapshot
from anynode.models.database import READ_BYTES_MAX, Database
from anynode.models.events import read_events, read_running
from anynode.models.messages import read_messages
from tests.kit.harness import sql

MINE = uuid.UUID(int=1)
MIB = 2**20
# Text that Postgres cannot compress, so that it is stored as large as it is.
NOISE = "(SELECT string_agg(md5(random()::text), '') FROM generate_series(1, $2::integer / 32))"


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    await sql(database_url, "INSERT INTO users (id) VALUES ('ada')")
    await sql(database_url, "INSERT INTO conversations (id, user_id) VALUES ($1, 'ada')", MINE)
    database = await Database.connect(database_url, pool_max=1)
    yield database
    await database.close()


async def add_messages(database_url: str, count: int, *, content: int = 0, calls: int = 0) -> None:
    """Messages of this size each, in bytes."""
    await sql(
        database_url,
        f"""WITH noise AS MATERIALIZED (SELECT {NOISE} AS text)
        INSERT INTO messages (id, conversation_id, user_id, position, role, content, tool_calls)
        SELECT gen_random_uuid(), $1, 'ada', n, 'assistant', CASE WHEN $3 THEN '' ELSE text END,
               CASE WHEN $3 THEN jsonb_build_array(text) END
        FROM generate_series(1, $4::integer) n, noise""",
        MINE,
        content or calls,
        bool(calls),
        count,
    )


async def add_events(database_url: str, *sizes: int) -> None:
    """Events of a journal, each of one of these sizes in bytes."""
    for seq, size in enumerate(sizes, 1):
        await sql(
            database_url,
            "INSERT INTO events (conversation_id, seq, epoch, type, payload) "
            f"SELECT $1, $3, 1, 'turn.delta', jsonb_build_object('text', coalesce({NOISE}, ''))",
            MINE,
            size,
            seq,
        )
    await sql(database_url, "UPDATE conversations SET last_seq = $2 WHERE id = $1", MINE, len(sizes))


@pytest.mark.parametrize("kind", ["content", "calls"])
async def test_a_snapshot_and_a_page_have_2_mib_and_say_that_there_is_more(
    database: Database, database_url: str, kind: str
) -> None:
    await add_messages(database_url, 9, **{kind: MIB // 2})
    snapshot = await read_snapshot(database, "ada", MINE, messages_max=200)
    assert snapshot is not None
    # The brackets of calls count too.
    assert ([row["position"] for row in snapshot.messages], snapshot.has_older) == (
        ([6, 7, 8, 9], True) if kind == "content" else ([7, 8, 9], True)
    )
    page = await read_messages(database, "ada", MINE, limit=200, before=None)
    assert page is not None
    assert [row["position"] for row in page.messages] == [row["position"] for row in snapshot.messages]
    assert not page.is_first


async def test_two_messages_come_however_large_they_are(database: Database, database_url: str) -> None:
    await add_messages(database_url, 3, content=3 * MIB)
    snapshot = await read_snapshot(database, "ada", MINE, messages_max=200)
    assert snapshot is not None
    assert ([row["position"] for row in snapshot.messages], snapshot.has_older) == ([2, 3], True)


@pytest.mark.parametrize(("messages_max", "has_older"), [(2, True), (3, False)])
async def test_a_snapshot_says_that_the_number_of_messages_leaves_some_out(
    database: Database, database_url: str, messages_max: int, has_older: bool
) -> None:
    await add_messages(database_url, 3, content=32)
    snapshot = await read_snapshot(database, "ada", MINE, messages_max=messages_max)
    assert snapshot is not None
    assert snapshot.has_older is has_older


async def test_a_snapshot_of_an_empty_conversation_leaves_none_out(database: Database) -> None:
    snapshot = await read_snapshot(database, "ada", MINE, messages_max=2)
    assert snapshot is not None
    assert not snapshot.has_older


async def test_a_reading_ends_with_the_event_that_fills_2_mib_and_the_next_goes_on(
    database: Database, database_url: str
) -> None:
    await add_events(database_url, *[MIB] * 7)
    after = 0
    for seqs, is_complete in (([1, 2], False), ([3, 4], False), ([5, 6], False), ([7], True)):
        reading = await read_events(database, "ada", MINE, after, limit=100)
        assert reading is not None
        assert ([event.seq for event in reading.events], reading.is_complete) == (seqs, is_complete)
        assert not reading.is_broken
        after = seqs[-1]


async def test_an_event_comes_however_large_it_is(database: Database, database_url: str) -> None:
    await add_events(database_url, 32, 2 * READ_BYTES_MAX, 32)
    reading = await read_events(database, "ada", MINE, 1, limit=100)
    assert reading is not None
    assert ([event.seq for event in reading.events], reading.is_complete) == ([2], False)


async def test_of_turns_elsewhere_a_large_event_is_read_alone(database: Database, database_url: str) -> None:
    await add_events(database_url, 32, 32, MIB, MIB, 32, 32)
    after = 1
    for seqs, is_complete in (([2], False), ([3], False), ([4, 5, 6], True), ([], True)):
        readings = await read_running(database, {MINE: after}, limit=63, within_seconds=5)
        reading = readings[MINE]
        assert ([event.seq for event in reading.events], reading.is_complete) == (seqs, is_complete)
        assert not reading.is_broken
        assert all(event.payload.startswith("{") for event in reading.events)
        after = seqs[-1] if seqs else after


@pytest.mark.parametrize(
    ("sizes", "shown", "is_cut"),
    [
        ([], 0, False),
        ([10, 10, 10], 3, False),
        ([1_000_000, 1_000_000, 97_152], 3, False),
        ([1, 1_000_000, 1_000_000, 97_152], 3, True),
        ([1_000_000, 3_000_000, 3_000_000], 2, True),
        ([3_000_000], 1, False),
        ([10] * 30, 20, False),  # the number of messages is the caller's business
    ],
)
async def test_a_history_has_two_mebibytes_and_two_messages_at_least(
    database: Database, database_url: str, sizes: list[int], shown: int, is_cut: bool
) -> None:
    await sql(
        database_url,
        """INSERT INTO messages (id, conversation_id, user_id, position, role, content)
           SELECT gen_random_uuid(), $1, 'ada', number, 'user', repeat('x', size)
           FROM unnest($2::integer[]) WITH ORDINALITY AS m (size, number)""",
        MINE,
        sizes,
    )
    found = await read_history(database, MINE, messages_max=20)
    assert found is not None
    _, messages, was_cut = found
    assert [len(message.content) for message in messages] == sizes[len(sizes) - shown :]
    assert was_cut == is_cut
