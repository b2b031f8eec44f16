"""The reader of one turn: from the journal while it holds the turn, else as it is stored, or nowhere."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, TypeAlias, cast
from uuid import UUID

import pytest

from anynode.models.conversations import Snapshot
from anynode.models.database import Database, Unavailable
from anynode.models.events import Event, Reading
from anynode.models.turns import TurnRef
from anynode.server.engine import turn_reader as module
from anynode.server.engine.follow import Follows
from anynode.server.engine.turn_events import events_of_stored
from anynode.server.engine.turn_reader import TurnInterrupted, TurnReader
from anynode.server.errors import ConversationBusy, DatabaseUnavailable, NotFound
from anynode.server.protocol.encoding import encode
from tests.kit.turns import (
    AT,
    CONVERSATION,
    ERROR,
    FIRST_SEQ,
    OTHER_TURN,
    STARTED,
    TURN,
    USAGE,
    USER,
    ended,
    journal,
    said,
    turn_ref,
)

Update: TypeAlias = Sequence[Event] | Snapshot | Exception

WHOLE = journal(STARTED, said("a "), said("b"), ended())
GONE = Snapshot(99, None, "", [])


class Following(Follows):
    """Follows as a script says; an error that clients can be told of is yielded, any other one raised."""

    def __init__(self, *script: Update) -> None:
        self.script = script
        self.asked: list[tuple[str, UUID, int | None, bool]] = []
        self.is_closed = False

    async def keep_following(
        self, user_id: str, conversation_id: UUID, after: int | None, *, is_own: bool = False
    ) -> AsyncGenerator[Sequence[Event] | Snapshot | DatabaseUnavailable, None]:
        self.asked.append((user_id, conversation_id, after, is_own))
        try:
            for update in self.script:
                if isinstance(update, DatabaseUnavailable) or not isinstance(update, Exception):
                    yield update
                else:
                    raise update
            await asyncio.Event().wait()
        finally:
            self.is_closed = True


class Stored:
    """What Postgres holds: the rows of the turn, and readings of the journal, one after the other; errors are
    raised."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.turn: Sequence[dict[str, Any]] | Exception | None = [row("completed", "a b")]
        self.readings: list[Reading | Exception | None] = []
        self.read_after: list[int] = []
        monkeypatch.setattr(module, "read_turn", self._read_turn)
        monkeypatch.setattr(module, "read_events", self._read_events)

    async def _read_turn(self, database: Database, user_id: str, conversation_id: UUID, turn_id: UUID) -> Any:
        assert (user_id, conversation_id, turn_id) == (USER, CONVERSATION, TURN)
        if isinstance(self.turn, Exception):
            raise self.turn
        return self.turn

    async def _read_events(
        self, database: Database, user_id: str, conversation_id: UUID, after: int, *, limit: int
    ) -> Reading | None:
        assert (user_id, conversation_id, limit) == (USER, CONVERSATION, 1000)
        self.read_after.append(after)
        reading = self.readings.pop(0)
        if isinstance(reading, Exception):
            raise reading
        return reading


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> Stored:
    return Stored(monkeypatch)


def row(status: str, content: str | None = None, **fields: Any) -> dict[str, Any]:
    """A row of the stored turn; without content it has no message."""
    return {
        "status": status,
        "usage": None if status == "running" else encode(USAGE),
        "error": encode(ERROR) if status == "failed" else None,
        "started_at": AT,
        "finished_at": None if status == "running" else AT,
        "id": None if content is None else TURN,
        "role": "assistant",
        "content": content,
        "tool_calls": None,
        "tool_name": None,
        "tool_call_id": None,
        "message_status": status,
        "created_at": AT,
        **fields,
    }


def reader_of(follows: Follows) -> TurnReader:
    return TurnReader(cast(Database, None), follows)


async def read(
    follows: Follows, turn: TurnRef, *, is_whole: bool = True, catches_up: bool = False
) -> tuple[list[list[Event]], type[Exception] | None]:
    """Return the batches that a reader yields, and the error that it ends with."""
    batches: list[list[Event]] = []
    try:
        async with (
            asyncio.timeout(5.0),
            aclosing(reader_of(follows).events(turn, is_whole=is_whole, catches_up=catches_up)) as reading,
        ):
            async for batch in reading:
                batches.append(list(batch))
    except (ConversationBusy, NotFound, DatabaseUnavailable) as error:
        return batches, type(error)
    return batches, None


# The table.

ENDED = ["completed", "cancelled", "failed"]


@pytest.mark.parametrize("status", [*ENDED, "running"])
@pytest.mark.parametrize("is_whole", [True, False])
async def test_the_journal_counts_while_it_holds_the_turn(stored: Stored, status: str, is_whole: bool) -> None:
    stored.turn = [row(status, "something else")]
    assert await read(Following(WHOLE), turn_ref(), is_whole=is_whole) == ([WHOLE], None)


@pytest.mark.parametrize("status", ENDED)
async def test_a_turn_that_the_journal_does_not_hold_is_shown_from_its_start_as_it_is_stored(
    stored: Stored, status: str
) -> None:
    stored.turn = [row(status, "a b")]
    following = Following(GONE)
    expected = events_of_stored(await reader_of(following).stored(turn_ref()))
    assert [event.type for event in expected] == ["turn.started", "turn.delta", f"turn.{status}"]
    assert await read(following, turn_ref()) == ([expected], None)


async def test_a_turn_that_runs_and_that_the_journal_does_not_hold_can_be_read_nowhere(stored: Stored) -> None:
    stored.turn = [row("running")]
    assert await read(Following(GONE), turn_ref()) == ([], TurnInterrupted)


@pytest.mark.parametrize("status", [*ENDED, "running"])
async def test_a_stored_turn_does_not_stand_in_for_the_rest_of_one(stored: Stored, status: str) -> None:
    stored.turn = [row(status, "a b")]
    assert await read(Following(GONE), turn_ref(), is_whole=False) == ([], TurnInterrupted)


@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize("status", [*ENDED, "running"])
async def test_a_turn_that_the_journal_loses_on_the_way_can_be_read_nowhere(
    stored: Stored, status: str, is_whole: bool
) -> None:
    stored.turn = [row(status, "a b")]
    following = Following(WHOLE[:2], GONE)
    assert await read(following, turn_ref(), is_whole=is_whole) == ([WHOLE[:2]], TurnInterrupted)


@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize("status", ENDED)
async def test_a_turn_whose_events_are_deleted_is_shown_as_it_is_stored(
    stored: Stored, status: str, is_whole: bool
) -> None:
    stored.turn = [row(status, "a b")]
    following = Following()
    batches, error = await read(following, turn_ref(None), is_whole=is_whole)
    assert ([[event.type for event in batch] for batch in batches], error) == (
        [["turn.started", "turn.delta", f"turn.{status}"]],
        None,
    )
    assert following.asked == []


@pytest.mark.parametrize("is_whole", [True, False])
async def test_a_turn_that_runs_although_its_events_are_deleted_can_be_read_nowhere(
    stored: Stored, is_whole: bool
) -> None:
    stored.turn = [row("running")]
    assert await read(Following(), turn_ref(None), is_whole=is_whole) == ([], TurnInterrupted)


def test_a_turn_that_is_interrupted_may_be_asked_for_again() -> None:
    assert (TurnInterrupted.code, TurnInterrupted.retryable) == ("conversation_busy", True)


# Following the journal.


async def test_a_turn_is_followed_from_its_first_event_as_the_users_own(stored: Stored) -> None:
    following = Following(WHOLE)
    await read(following, turn_ref())
    assert following.asked == [(USER, CONVERSATION, FIRST_SEQ - 1, True)]
    assert following.is_closed


async def test_batches_come_as_they_are_committed_up_to_the_end_and_no_further(stored: Stored) -> None:
    following = Following(WHOLE[:1], WHOLE[1:3], WHOLE[3:], journal(STARTED, first_seq=11))
    assert await read(following, turn_ref()) == ([WHOLE[:1], WHOLE[1:3], WHOLE[3:]], None)


async def test_events_of_others_are_passed_over(stored: Stored) -> None:
    before = journal(("message.created", {}), first_seq=FIRST_SEQ - 1, turn_id=None)
    other = journal(STARTED, first_seq=50, turn_id=OTHER_TURN)
    following = Following([*before, *WHOLE[:2]], other, [*WHOLE[2:], *other])
    assert await read(following, turn_ref()) == ([WHOLE[:2], WHOLE[2:]], None)


async def test_the_end_of_another_turn_is_not_the_end_of_this_one(stored: Stored) -> None:
    other = journal(ended(), first_seq=50, turn_id=OTHER_TURN)
    assert await read(Following(other, WHOLE), turn_ref()) == ([WHOLE], None)


async def test_a_turn_is_followed_on_when_postgres_is_back(stored: Stored, caplog: pytest.LogCaptureFixture) -> None:
    unavailable = DatabaseUnavailable()
    unavailable.__cause__ = Unavailable("OSError: refused")
    with caplog.at_level(logging.WARNING):
        shown = await read(Following(WHOLE[:2], unavailable, unavailable, WHOLE[2:]), turn_ref())
    assert shown == ([WHOLE[:2], WHOLE[2:]], None)
    assert [record.message for record in caplog.records] == [
        f"turn {TURN} is followed on when Postgres is back: OSError: refused"
    ] * 2


@pytest.mark.parametrize("before", [[], [WHOLE[:2]]])
async def test_a_conversation_that_is_deleted_meanwhile_is_not_found(stored: Stored, before: list[Any]) -> None:
    assert await read(Following(*before, NotFound()), turn_ref()) == (before, NotFound)


async def test_a_reader_that_stops_half_way_closes_what_it_follows(stored: Stored) -> None:
    following = Following(WHOLE[:1], WHOLE[1:])
    reading = reader_of(following).events(turn_ref(), is_whole=True)
    assert await anext(reading) == WHOLE[:1]
    assert not following.is_closed
    await reading.aclose()
    assert following.is_closed


async def test_a_reader_that_is_cancelled_closes_what_it_follows(stored: Stored) -> None:
    following = Following(WHOLE[:1])
    reading = asyncio.create_task(read(following, turn_ref()))
    for _ in range(5):
        await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert following.is_closed


# A turn that is not new: first what is committed by now.


def reading_of(events: Sequence[Event], *, is_complete: bool = True, is_broken: bool = False) -> Reading:
    return Reading(list(events), is_broken, is_complete, is_running=True)


async def test_a_turn_that_is_not_new_begins_with_all_that_is_committed_and_goes_on_behind_it(stored: Stored) -> None:
    stored.readings = [reading_of(WHOLE[:2])]
    following = Following(WHOLE[2:])
    assert await read(following, turn_ref(), catches_up=True) == ([WHOLE[:2], WHOLE[2:]], None)
    assert stored.read_after == [FIRST_SEQ - 1]
    assert following.asked == [(USER, CONVERSATION, WHOLE[1].seq, True)]


async def test_a_turn_that_has_ended_is_one_batch_of_as_many_readings_as_it_takes(stored: Stored) -> None:
    stored.readings = [
        reading_of(WHOLE[:1], is_complete=False),
        reading_of(WHOLE[1:2], is_complete=False),
        reading_of(WHOLE[2:]),
    ]
    following = Following()
    assert await read(following, turn_ref(), catches_up=True) == ([WHOLE], None)
    assert stored.read_after == [FIRST_SEQ - 1, FIRST_SEQ, FIRST_SEQ + 1]
    assert following.asked == []


async def test_nothing_is_read_beyond_the_end_of_the_turn_and_events_of_others_are_passed_over(stored: Stored) -> None:
    other = journal(STARTED, first_seq=50, turn_id=OTHER_TURN)
    stored.readings = [reading_of([*WHOLE, *other], is_complete=False)]
    assert await read(Following(), turn_ref(), catches_up=True) == ([WHOLE], None)
    assert len(stored.read_after) == 1


async def test_a_turn_of_which_nothing_is_committed_yet_is_followed_from_its_start(stored: Stored) -> None:
    stored.readings = [reading_of([])]
    following = Following(WHOLE)
    assert await read(following, turn_ref(), catches_up=True) == ([WHOLE], None)
    assert following.asked == [(USER, CONVERSATION, FIRST_SEQ - 1, True)]


@pytest.mark.parametrize(
    ("is_whole", "status", "expected"),
    [
        (True, "completed", (1, None)),
        (True, "running", (0, TurnInterrupted)),
        (False, "completed", (0, TurnInterrupted)),
    ],
)
async def test_a_turn_that_is_not_new_and_that_the_journal_does_not_hold_follows_the_same_table(
    stored: Stored, is_whole: bool, status: str, expected: tuple[int, type[Exception] | None]
) -> None:
    stored.readings = [reading_of([], is_broken=True)]
    stored.turn = [row(status, "a b")]
    batches, error = await read(Following(), turn_ref(), is_whole=is_whole, catches_up=True)
    assert (len(batches), error) == expected


async def test_a_turn_that_the_journal_loses_between_two_readings_has_shown_nothing_yet(stored: Stored) -> None:
    stored.readings = [reading_of(WHOLE[:1], is_complete=False), reading_of([], is_broken=True)]
    (batch,), error = await read(Following(), turn_ref(), catches_up=True)
    assert ([event.type for event in batch], error) == (["turn.started", "turn.delta", "turn.completed"], None)


async def test_a_turn_that_the_journal_loses_behind_what_was_committed_can_be_read_nowhere(stored: Stored) -> None:
    stored.readings = [reading_of(WHOLE[:2])]
    assert await read(Following(GONE), turn_ref(), catches_up=True) == ([WHOLE[:2]], TurnInterrupted)


async def test_a_deleted_conversation_is_not_found_by_the_first_reading(stored: Stored) -> None:
    stored.readings = [None]
    assert await read(Following(), turn_ref(), catches_up=True) == ([], NotFound)


async def test_postgres_that_is_away_before_the_first_batch_is_said(stored: Stored) -> None:
    stored.readings = [Unavailable()]
    assert await read(Following(), turn_ref(), catches_up=True) == ([], DatabaseUnavailable)
    stored.turn = Unavailable()
    assert await read(Following(), turn_ref(None)) == ([], DatabaseUnavailable)
    assert await read(Following(GONE), turn_ref()) == ([], DatabaseUnavailable)


# The stored turn.


async def test_a_stored_turn_has_its_messages_in_order(stored: Stored) -> None:
    calls = '[{"id": "1", "type": "function", "function": {"name": "search", "arguments": "{}"}}]'
    stored.turn = [
        row("failed", "a", tool_calls=calls, message_status="completed"),
        row("failed", "found", role="tool", tool_call_id="1", tool_name="search", message_status="completed"),
        row("failed", "b"),
    ]
    turn = await reader_of(Following()).stored(turn_ref())
    assert (turn.conversation_id, turn.turn_id, turn.status) == (CONVERSATION, TURN, "failed")
    assert (turn.usage, turn.error, turn.created_at, turn.finished_at) == (USAGE, ERROR, AT, AT)
    shown = [(message.role, message.content, message.status, message.turn_id) for message in turn.messages]
    assert shown == [
        ("assistant", "a", "completed", TURN),
        ("tool", "found", "completed", TURN),
        ("assistant", "b", "failed", TURN),
    ]


async def test_a_stored_turn_that_runs_has_no_message(stored: Stored) -> None:
    stored.turn = [row("running")]
    turn = await reader_of(Following()).stored(turn_ref())
    assert (turn.status, turn.messages, turn.usage, turn.error, turn.finished_at) == ("running", [], None, None, None)


async def test_a_turn_that_is_not_the_users_is_not_found(stored: Stored) -> None:
    stored.turn = None
    with pytest.raises(NotFound, match="There is no such turn"):
        await reader_of(Following()).stored(turn_ref())


# Waiting for the end.


@pytest.mark.parametrize(
    "script",
    [[WHOLE], [WHOLE[:2], WHOLE[2:]], [WHOLE[:2], DatabaseUnavailable(), WHOLE[2:]], [GONE], [WHOLE[:2], GONE]],
)
async def test_a_wait_is_over_with_the_turns_end_or_when_the_journal_does_not_hold_it(script: list[Update]) -> None:
    async with asyncio.timeout(5.0):
        await reader_of(Following(*script)).wait_end(turn_ref())


async def test_a_turn_whose_events_are_deleted_has_ended() -> None:
    following = Following()
    await reader_of(following).wait_end(turn_ref(None))
    assert following.asked == []


async def test_a_wait_goes_on_while_the_turn_runs() -> None:
    waiting = asyncio.create_task(reader_of(Following(WHOLE[:3])).wait_end(turn_ref()))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not waiting.done()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_a_wait_in_a_conversation_that_is_deleted_meanwhile_says_so() -> None:
    with pytest.raises(NotFound):
        await reader_of(Following(WHOLE[:2], NotFound())).wait_end(turn_ref())
