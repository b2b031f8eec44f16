"""When a flush is due, what a turn's buffer gives it, and what becomes of a turn by the answer of Postgres."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, cast
from uuid import UUID

import pytest

from anynode.models.database import Database, Unavailable
from anynode.models.events import Ending, Entry, Event, NewMessage
from anynode.server.engine import journal as module
from anynode.server.engine.journal import URGENT_TURNS, FlushSchedule, Journal, TurnBuffer, TurnJournal

TURN = UUID("018f0000-0000-7000-8000-000000000002")
OTHER_TURN = UUID("018f0000-0000-7000-8000-000000000003")
ENDING = Ending(
    "completed",
    [NewMessage(UUID(int=4), "user", 1, "assistant", "said", "completed", datetime(2024, 5, 6, tzinfo=UTC))],
)
NO_DATABASE = cast(Database, None)

Shown = tuple[int, str, str]


def shown(events: Sequence[Event]) -> list[Shown]:
    """Each event's seq, type and payload."""
    return [(event.seq, event.type, event.payload) for event in events]


# When a flush is due.


def schedule(*, open_turns: int = 1, now: float = 100.0) -> FlushSchedule:
    """A schedule with an interval of 2 s, whose last flush was just now."""
    made = FlushSchedule(2.0, now - 50)
    made.open_turns = open_turns
    made.flushed(now)
    return made


def test_text_waits_for_the_interval() -> None:
    assert schedule().want(101.0, is_urgent=False) == 103.0


@pytest.mark.parametrize(
    ("open_turns", "at"),
    [(0, 100.0), (1, 100.02), (50, 101.0), (URGENT_TURNS, 102.0), (10 * URGENT_TURNS, 102.0)],
)
def test_urgency_keeps_a_distance_to_the_last_flush_that_grows_with_the_turns(open_turns: int, at: float) -> None:
    assert schedule(open_turns=open_turns).want(100.01, is_urgent=True) == pytest.approx(at)


def test_the_first_flush_of_a_node_may_be_at_once() -> None:
    first = FlushSchedule(2.0, 100.0)
    first.open_turns = 10 * URGENT_TURNS
    assert first.want(100.0, is_urgent=True) == 100.0


def test_a_flush_that_is_due_as_early_is_not_asked_for_again() -> None:
    due = schedule()
    assert due.want(101.0, is_urgent=False) == 103.0
    assert due.want(102.0, is_urgent=False) is None
    assert due.due_at == 103.0


def test_urgency_brings_a_flush_forward_that_text_has_asked_for() -> None:
    due = schedule()
    due.want(101.0, is_urgent=False)
    assert due.want(101.0, is_urgent=True) == pytest.approx(100.02)
    assert due.want(101.0, is_urgent=True) is None


def test_text_does_not_put_an_urgent_flush_off() -> None:
    due = schedule()
    due.want(101.0, is_urgent=True)
    assert due.want(101.0, is_urgent=False) is None
    assert due.due_at == pytest.approx(100.02)


def test_after_a_flush_the_next_one_is_asked_for_anew() -> None:
    due = schedule()
    due.want(101.0, is_urgent=True)
    due.flushed(101.0)
    assert due.due_at is None
    assert due.want(101.5, is_urgent=False) == 103.5


# What a turn's buffer gives a flush.


def buffer(next_seq: int = 7) -> TurnBuffer:
    """The buffer of a turn in its third epoch."""
    return TurnBuffer(TURN, 3, next_seq)


def test_adjacent_texts_are_one_event() -> None:
    turn = buffer()
    turn.add_text("one ")
    turn.add_text("t\u00f6o")
    entry = turn.take()
    assert (entry.turn_id, entry.epoch, entry.ending) == (TURN, 3, None)
    assert shown(entry.events) == [(7, "turn.delta", '{"text":"one t\u00f6o"}')]
    assert entry.events[0].turn_id == str(TURN)


def test_events_keep_their_order_and_separate_texts() -> None:
    turn = buffer()
    turn.add_text("before")
    turn.add_event("turn.tool_call", '{"n":1}')
    turn.add_event("turn.tool_result", '{"n":2}')
    turn.add_text("after")
    assert shown(turn.take().events) == [
        (7, "turn.delta", '{"text":"before"}'),
        (8, "turn.tool_call", '{"n":1}'),
        (9, "turn.tool_result", '{"n":2}'),
        (10, "turn.delta", '{"text":"after"}'),
    ]


def test_a_flush_takes_everything_once_and_the_next_one_counts_on() -> None:
    turn = buffer()
    turn.add_text("one")
    first = turn.take()
    assert turn.take().events == []
    turn.add_text("two")
    turn.add_text("three")
    assert shown(first.events) == [(7, "turn.delta", '{"text":"one"}')]
    assert shown(turn.take().events) == [(8, "turn.delta", '{"text":"twothree"}')]


def test_what_comes_after_the_ending_is_ignored() -> None:
    turn = buffer()
    turn.add_text("said")
    turn.end("turn.completed", "{}", ENDING)
    assert turn.is_ending
    turn.add_text("more")
    turn.add_event("turn.tool_call", "{}")
    turn.end("turn.failed", "{}", Ending("failed", []))
    entry = turn.take()
    assert [event.type for event in entry.events] == ["turn.delta", "turn.completed"]
    assert entry.ending is ENDING


def test_a_turn_is_over_once_its_ending_is_committed() -> None:
    turn = buffer()
    turn.add_text("said")
    turn.commit(turn.take())
    assert (turn.committed_seq, turn.is_over) == (7, False)
    turn.end("turn.completed", "{}", ENDING)
    entry = turn.take()
    assert not turn.is_over
    turn.commit(entry)
    assert (turn.committed_seq, turn.is_over, turn.is_lost) == (8, True, False)


def test_a_lost_turn_forgets_what_no_flush_has_taken_and_accepts_nothing() -> None:
    turn = buffer()
    turn.add_text("said")
    turn.add_event("turn.tool_call", "{}")
    turn.add_text("more")
    turn.lose()
    turn.add_text("again")
    turn.end("turn.completed", "{}", ENDING)
    entry = turn.take()
    assert (list(entry.events), entry.ending) == ([], None)
    assert (turn.is_lost, turn.is_over, turn.is_ending) == (True, False, False)


def test_a_turn_that_is_over_cannot_be_lost() -> None:
    turn = buffer()
    turn.end("turn.completed", "{}", ENDING)
    turn.commit(turn.take())
    turn.lose()
    assert (turn.is_lost, turn.is_over) == (False, True)


def test_closing_a_text_tells_the_seq_of_what_was_said_last() -> None:
    turn = buffer()
    assert turn.close_text() == 6
    turn.add_text("one")
    assert turn.close_text() == 7
    turn.add_text("two")  # in the same flush, but not in the event that was closed
    assert shown(turn.take().events) == [(7, "turn.delta", '{"text":"one"}'), (8, "turn.delta", '{"text":"two"}')]
    assert turn.close_text() == 8


# The journal of a node, and Postgres.


class Postgres:
    """Takes flushes, and answers each as the test says."""

    def __init__(self) -> None:
        self.flushes: asyncio.Queue[tuple[Sequence[Entry], asyncio.Future[set[UUID]]]] = asyncio.Queue()
        self.ended: set[UUID] = set()  # turns that have ended under the epoch that they are claimed in
        self.claims: list[Mapping[UUID, int]] = []

    async def flush(self, database: Database, entries: Sequence[Entry], *, within_seconds: float) -> set[UUID]:
        answer: asyncio.Future[set[UUID]] = asyncio.get_running_loop().create_future()
        await self.flushes.put((entries, answer))
        return await answer

    async def ended_under(self, database: Database, claims: Mapping[UUID, int], *, within_seconds: float) -> set[UUID]:
        self.claims.append(claims)
        return self.ended & claims.keys()


class Turn:
    """A turn in the journal, with what was published of it."""

    def __init__(self, journal: Journal, turn_id: UUID, next_seq: int = 7) -> None:
        self.published: list[Event] = []
        self.ends: list[bool] = []
        self.journal: TurnJournal = journal.open(turn_id, 3, next_seq, self._publish)

    def _publish(self, events: Sequence[Event], is_over: bool) -> None:
        self.published.extend(events)
        self.ends.append(is_over)


@pytest.fixture
def postgres(monkeypatch: pytest.MonkeyPatch) -> Postgres:
    """Postgres, in the journal's place of it."""
    made = Postgres()
    monkeypatch.setattr(module, "flush", made.flush)
    monkeypatch.setattr(module, "ended_under", made.ended_under)
    return made


@pytest.fixture
async def journal(postgres: Postgres) -> AsyncIterator[Journal]:
    """A journal that flushes at once, as long as no flush is under way."""
    made = Journal(NO_DATABASE, flush_interval_seconds=0.0, attempt_seconds=1.0)
    running = asyncio.create_task(made.run())
    yield made
    running.cancel()
    await asyncio.wait((running,))


async def test_nothing_is_published_before_its_commit_is_known(postgres: Postgres, journal: Journal) -> None:
    turn = Turn(journal, TURN)
    turn.journal.add_text("said", is_urgent=True)
    _, answer = await postgres.flushes.get()
    assert turn.published == []
    waiting = asyncio.create_task(turn.journal.wait_committed())
    answer.set_result(set())
    await waiting
    assert (shown(turn.published), turn.ends) == ([(7, "turn.delta", '{"text":"said"}')], [False])


async def test_the_next_batch_collects_while_a_flush_is_under_way(postgres: Postgres, journal: Journal) -> None:
    turn, other = Turn(journal, TURN), Turn(journal, OTHER_TURN, 1)
    turn.journal.add_text("one")
    _, first = await postgres.flushes.get()
    turn.journal.add_text("two ")
    turn.journal.add_event("turn.tool_call", "{}")
    other.journal.add_text("else")
    assert postgres.flushes.empty()  # never two at once
    first.set_result(set())
    entries, second = await postgres.flushes.get()
    assert [shown(entry.events) for entry in entries] == [
        [(8, "turn.delta", '{"text":"two "}'), (9, "turn.tool_call", "{}")],
        [(1, "turn.delta", '{"text":"else"}')],
    ]
    second.set_result(set())
    await turn.journal.wait_committed()
    await other.journal.wait_committed()
    assert postgres.flushes.empty()


async def test_an_ending_closes_the_turn_when_it_is_committed(postgres: Postgres, journal: Journal) -> None:
    turn = Turn(journal, TURN)
    turn.journal.end("turn.completed", "{}", ENDING)
    (entry,), answer = await postgres.flushes.get()
    assert entry.ending is ENDING
    assert not turn.journal.closed.done()
    answer.set_result(set())
    assert await turn.journal.closed
    assert (turn.ends, turn.journal.is_lost) == ([True], False)


async def test_a_refused_turn_is_lost_and_nothing_of_it_is_published(postgres: Postgres, journal: Journal) -> None:
    turn, other = Turn(journal, TURN), Turn(journal, OTHER_TURN)
    turn.journal.add_text("said")
    other.journal.add_text("said")
    _, answer = await postgres.flushes.get()
    answer.set_result({TURN})
    assert not await turn.journal.closed
    await other.journal.wait_committed()
    assert (turn.published, len(other.published)) == ([], 1)
    assert postgres.claims == [{TURN: 3}]
    turn.journal.add_text("more", is_urgent=True)
    turn.journal.add_event("turn.tool_call", "{}")
    other.journal.add_text("more", is_urgent=True)
    entries, answer = await postgres.flushes.get()
    assert [entry.turn_id for entry in entries] == [OTHER_TURN]
    answer.set_result(set())


async def test_a_turn_that_ended_under_its_own_epoch_was_not_refused(postgres: Postgres, journal: Journal) -> None:
    postgres.ended = {TURN}
    turn = Turn(journal, TURN)
    turn.journal.end("turn.completed", "{}", ENDING)
    _, answer = await postgres.flushes.get()
    answer.set_result({TURN})
    assert await turn.journal.closed
    assert turn.ends == [True]


async def test_a_flush_whose_outcome_is_unknown_is_repeated_as_it_was(postgres: Postgres, journal: Journal) -> None:
    turn = Turn(journal, TURN)
    turn.journal.add_text("said")
    first_entries, first = await postgres.flushes.get()
    turn.journal.add_text("more")
    first.set_exception(Unavailable("no answer"))
    entries, second = await postgres.flushes.get()
    assert list(entries) == list(first_entries)
    assert turn.published == []
    second.set_result(set())
    entries, third = await postgres.flushes.get()
    assert [shown(entry.events) for entry in entries] == [[(8, "turn.delta", '{"text":"more"}')]]
    third.set_result(set())
    await turn.journal.wait_committed()
    assert [event.seq for event in turn.published] == [7, 8]


async def test_a_turn_that_is_given_up_is_not_flushed_again(postgres: Postgres, journal: Journal) -> None:
    turn, other = Turn(journal, TURN), Turn(journal, OTHER_TURN)
    turn.journal.add_text("said")
    other.journal.add_text("said")
    _, first = await postgres.flushes.get()
    turn.journal.lose()
    first.set_exception(Unavailable("no answer"))
    entries, second = await postgres.flushes.get()
    assert [entry.turn_id for entry in entries] == [OTHER_TURN]
    second.set_result(set())


async def test_a_turn_that_is_given_up_during_a_flush_publishes_nothing(postgres: Postgres, journal: Journal) -> None:
    turn, other = Turn(journal, TURN), Turn(journal, OTHER_TURN)
    turn.journal.add_text("said")
    other.journal.add_text("said")
    _, answer = await postgres.flushes.get()
    turn.journal.lose()
    answer.set_result(set())
    await other.journal.wait_committed()
    assert (turn.published, len(other.published)) == ([], 1)


async def test_a_turn_that_postgres_cannot_take_is_lost_and_the_others_go_on(
    postgres: Postgres, journal: Journal
) -> None:
    turn, other = Turn(journal, TURN), Turn(journal, OTHER_TURN)
    turn.journal.add_text("bad")
    other.journal.add_text("good")
    _, together = await postgres.flushes.get()
    together.set_exception(ValueError("bad"))
    (entry,), alone = await postgres.flushes.get()
    assert entry.turn_id == TURN
    alone.set_exception(ValueError("bad"))
    (entry,), alone = await postgres.flushes.get()
    assert entry.turn_id == OTHER_TURN
    alone.set_result(set())
    await other.journal.wait_committed()
    assert not await turn.journal.closed
    assert (turn.published, len(other.published)) == ([], 1)


async def test_who_waits_for_a_commit_is_told_when_the_turn_is_lost(postgres: Postgres, journal: Journal) -> None:
    turn = Turn(journal, TURN)
    turn.journal.add_event("turn.tool_call", "{}")
    waiting = asyncio.create_task(turn.journal.wait_committed())
    await postgres.flushes.get()
    assert not waiting.done()
    turn.journal.lose()
    await waiting


async def test_waiting_for_a_commit_is_for_all_that_was_said_before_and_no_more(
    postgres: Postgres, journal: Journal
) -> None:
    turn = Turn(journal, TURN)
    turn.journal.add_text("one")
    _, first = await postgres.flushes.get()
    turn.journal.add_event("turn.tool_call", "{}")
    waiting = asyncio.create_task(turn.journal.wait_committed())
    first.set_result(set())
    _, second = await postgres.flushes.get()
    assert not waiting.done()
    turn.journal.add_text("three")
    second.set_result(set())
    await waiting
    assert [event.seq for event in turn.published] == [7, 8]


@pytest.fixture
async def timers(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When timers were set for, by a clock that stands still at 1000."""
    loop = asyncio.get_running_loop()
    made: list[float] = []

    def call_at(when: float, callback: Any) -> asyncio.TimerHandle:
        made.append(when)
        return asyncio.TimerHandle(when, callback, (), loop)

    monkeypatch.setattr(loop, "time", lambda: 1000.0)
    monkeypatch.setattr(loop, "call_at", call_at)
    return made


@pytest.fixture
async def slow_journal(postgres: Postgres, timers: list[float]) -> AsyncIterator[Journal]:
    """A journal that lets a minute pass between two flushes in a crowd."""
    made = Journal(NO_DATABASE, flush_interval_seconds=60.0, attempt_seconds=1.0)
    running = asyncio.create_task(made.run())
    yield made
    running.cancel()
    await asyncio.wait((running,))


async def test_text_waits_for_a_timer_and_urgency_does_not(
    postgres: Postgres, slow_journal: Journal, timers: list[float]
) -> None:
    turn = Turn(slow_journal, TURN)
    turn.journal.add_text("one ")
    turn.journal.add_text("two")
    assert timers == [1060.0]
    turn.journal.add_text(" three", is_urgent=True)
    (entry,), answer = await postgres.flushes.get()
    assert shown(entry.events) == [(7, "turn.delta", '{"text":"one two three"}')]
    answer.set_result(set())
    await turn.journal.wait_committed()
    assert timers == [1060.0]


async def test_urgency_right_after_a_flush_waits_by_the_number_of_turns_that_are_open(
    postgres: Postgres, slow_journal: Journal, timers: list[float]
) -> None:
    turn, other = Turn(slow_journal, TURN), Turn(slow_journal, OTHER_TURN)
    turn.journal.add_text("one", is_urgent=True)
    _, answer = await postgres.flushes.get()
    turn.journal.add_event("turn.tool_call", "{}")
    assert timers == [1000.0 + 60.0 * 2 / URGENT_TURNS]
    other.journal.lose()
    answer.set_result(set())
    await asyncio.wait((other.journal.closed,))
    turn.journal.add_event("turn.tool_call", "{}")
    assert timers[1:] == [1000.0 + 60.0 * 1 / URGENT_TURNS]
