"""What a reading of the journal finds after a cursor, and when only a snapshot helps."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator

import pytest

from anynode.models.database import Database
from anynode.models.events import Reading, read_events, read_running
from tests.kit.harness import sql

MINE = uuid.UUID(int=1)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    database = await Database.connect(database_url, pool_max=1)
    yield database
    await database.close()


async def fill(database_url: str, *, last_seq: int, kept: range) -> None:
    """A conversation of Ada's whose journal still has those events."""
    await sql(database_url, "INSERT INTO users (id) VALUES ('ada')")
    await sql(database_url, "INSERT INTO conversations (id, user_id, last_seq) VALUES ($1, 'ada', $2)", MINE, last_seq)
    statement = "INSERT INTO events SELECT $1, seq, NULL, 1, 'turn.delta', '{}' FROM unnest($2::integer[]) seq"
    await sql(database_url, statement, MINE, list(kept))


async def read(database: Database, after: int, *, limit: int = 100) -> Reading:
    """What both ways of reading find."""
    reading = await read_events(database, "ada", MINE, after, limit=limit)
    readings = await read_running(database, {MINE: after}, limit=limit, within_seconds=5)
    assert readings == {MINE: reading}
    assert reading is not None
    return reading


def seqs(reading: Reading) -> list[int]:
    return [event.seq for event in reading.events]


@pytest.mark.parametrize("after", range(10))
async def test_of_a_whole_journal_every_cursor_gets_what_follows_it(
    database: Database, database_url: str, after: int
) -> None:
    await fill(database_url, last_seq=9, kept=range(1, 10))
    reading = await read(database, after)
    assert (seqs(reading), reading.is_broken, reading.is_complete) == (list(range(after + 1, 10)), False, True)


@pytest.mark.parametrize("after", [0, 1, 3])
async def test_a_cursor_before_what_is_kept_gets_no_events_with_a_gap_before_them(
    database: Database, database_url: str, after: int
) -> None:
    await fill(database_url, last_seq=9, kept=range(5, 10))
    assert (await read(database, after)).is_broken


@pytest.mark.parametrize("after", [4, 5, 9])
async def test_a_cursor_just_before_what_is_kept_or_in_it_gets_what_follows(
    database: Database, database_url: str, after: int
) -> None:
    await fill(database_url, last_seq=9, kept=range(5, 10))
    reading = await read(database, after)
    assert (seqs(reading), reading.is_broken) == (list(range(after + 1, 10)), False)


@pytest.mark.parametrize(("after", "is_broken"), [(0, True), (8, True), (9, False), (10, True)])
async def test_where_nothing_is_kept_only_the_cursor_at_the_end_needs_no_snapshot(
    database: Database, database_url: str, after: int, is_broken: bool
) -> None:
    await fill(database_url, last_seq=9, kept=range(0))
    reading = await read(database, after)
    assert (seqs(reading), reading.is_broken) == ([], is_broken)


@pytest.mark.parametrize("after", [10, 1000])
async def test_a_cursor_ahead_of_the_journal_needs_a_snapshot(
    database: Database, database_url: str, after: int
) -> None:
    await fill(database_url, last_seq=9, kept=range(1, 10))
    reading = await read(database, after)
    assert (seqs(reading), reading.is_broken) == ([], True)


async def test_what_is_beyond_the_limit_is_said_to_be_there(database: Database, database_url: str) -> None:
    await fill(database_url, last_seq=9, kept=range(1, 10))
    reading = await read(database, 2, limit=3)
    assert (seqs(reading)[:3], reading.is_complete) == ([3, 4, 5], False)
    reading = await read(database, 6, limit=4)
    assert (seqs(reading), reading.is_complete) == ([7, 8, 9], True)


async def test_there_is_no_reading_of_somebody_elses_conversation(database: Database, database_url: str) -> None:
    await fill(database_url, last_seq=9, kept=range(1, 10))
    assert await read_events(database, "bob", MINE, 0, limit=100) is None
    assert await read_events(database, "ada", uuid.UUID(int=2), 0, limit=100) is None
