"""Waiting for a turn that is in the way: how its end is seen, who goes on first, and when an attempt is the last."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID

import pytest

from anynode.models.conversations import Snapshot
from anynode.models.database import Unavailable
from anynode.models.events import Event
from anynode.server.engine import interrupts as module
from anynode.server.engine.interrupts import Interrupts, repeat_while_busy
from anynode.server.errors import DatabaseUnavailable, NotFound
from tests.kit.turns import CONVERSATION, OTHER_TURN, TURN, USER


class Clock:
    """The monotonic clock, for tests to set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class Journal:
    """What following shows: updates as the test puts them, errors raised; and from where it was followed."""

    def __init__(self) -> None:
        self.updates: asyncio.Queue[Any] = asyncio.Queue()
        self.asked: list[tuple[str, UUID, int | None]] = []
        self.is_closed = False

    async def follow(
        self, user_id: str, conversation_id: UUID, after: int | None, *, is_own: bool
    ) -> AsyncGenerator[Any, None]:
        assert is_own
        self.asked.append((user_id, conversation_id, after))
        try:
            while True:
                update = await self.updates.get()
                if isinstance(update, Exception):
                    raise update
                yield update
        finally:
            self.is_closed = True


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> Journal:
    monkeypatch.setattr(module, "AGAIN_SECONDS", 0.0)
    return Journal()


def event(type: str, turn_id: UUID = TURN) -> Event:
    return Event(8, type, str(turn_id), "{}")


def interrupts_of(journal: Journal) -> tuple[Interrupts, asyncio.Event]:
    draining = asyncio.Event()
    return Interrupts(cast(Any, journal), draining), draining


# The end of a turn.


@pytest.mark.parametrize("type", ["turn.completed", "turn.cancelled", "turn.failed"])
async def test_the_end_is_that_of_the_turn_and_comes_after_the_seq(journal: Journal, type: str) -> None:
    interrupts, _ = interrupts_of(journal)
    waiting = asyncio.create_task(interrupts.wait_end(USER, CONVERSATION, TURN, 7, within_seconds=5.0))
    for update in ([event("turn.delta")], [event("turn.restarted")], [event(type, OTHER_TURN)]):
        journal.updates.put_nowait(update)
    for _ in range(10):
        await asyncio.sleep(0)
    assert journal.updates.empty()
    assert not waiting.done()
    journal.updates.put_nowait([event("turn.delta"), event(type)])
    await waiting
    assert journal.asked == [(USER, CONVERSATION, 7)]
    assert journal.is_closed


@pytest.mark.parametrize("news", [Snapshot(9, None, "", []), NotFound()], ids=["snapshot", "deleted"])
async def test_where_the_journal_cannot_show_the_end_another_attempt_is_made(journal: Journal, news: Any) -> None:
    interrupts, _ = interrupts_of(journal)
    journal.updates.put_nowait(news)
    async with asyncio.timeout(1):
        await interrupts.wait_end(USER, CONVERSATION, TURN, 7, within_seconds=60.0)
    assert journal.is_closed


async def test_a_postgres_that_is_away_is_told_with_the_conversation(journal: Journal) -> None:
    interrupts, _ = interrupts_of(journal)
    journal.updates.put_nowait(Unavailable())
    with pytest.raises(DatabaseUnavailable) as refused:
        await interrupts.wait_end(USER, CONVERSATION, TURN, 7, within_seconds=60.0)
    assert refused.value.conversation_id == CONVERSATION


async def test_a_wait_is_over_with_its_time_with_a_drain_and_with_its_caller(journal: Journal) -> None:
    interrupts, draining = interrupts_of(journal)
    await interrupts.wait_end(USER, CONVERSATION, TURN, 7, within_seconds=0.001)
    assert journal.is_closed
    waiting = asyncio.create_task(interrupts.wait_end(USER, CONVERSATION, TURN, 7, within_seconds=60.0))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait((waiting,))
    assert waiting.cancelled()
    draining.set()
    async with asyncio.timeout(1):
        await interrupts.wait_end(USER, CONVERSATION, TURN, 7, within_seconds=60.0)


# One after the other.


async def test_those_who_wait_go_on_in_order_and_one_who_goes_leaves_the_place_to_the_next(journal: Journal) -> None:
    interrupts, _ = interrupts_of(journal)
    order: list[tuple[int, bool]] = []
    may_go = [asyncio.Event() for _ in range(4)]

    async def go(number: int) -> None:
        async with interrupts.one_at_a_time(USER, CONVERSATION, within_seconds=60.0) as (has_waited, _):
            order.append((number, has_waited))
            await may_go[number].wait()

    tasks = [asyncio.create_task(go(number)) for number in range(4)]
    await asyncio.sleep(0)
    tasks[1].cancel()
    await asyncio.wait((tasks[1],))
    assert order == [(0, False)]
    tasks[0].cancel()
    may_go[2].set()
    may_go[3].set()
    await asyncio.wait(tasks)
    assert order == [(0, False), (2, True), (3, True)]
    assert interrupts._queues == {}


async def test_who_has_waited_for_too_long_goes_on_without_any_time_left(journal: Journal) -> None:
    interrupts, _ = interrupts_of(journal)
    async with interrupts.one_at_a_time(USER, CONVERSATION, within_seconds=60.0):
        async with interrupts.one_at_a_time(USER, CONVERSATION, within_seconds=0.001) as (has_waited, left_seconds):
            assert (has_waited, left_seconds) == (True, 0.0)
        async with interrupts.one_at_a_time("another", CONVERSATION, within_seconds=60.0) as (has_waited, _):
            assert not has_waited
    assert interrupts._queues == {}


# Repeating what a running turn is in the way of.


async def test_an_attempt_that_nothing_is_in_the_way_of_is_made_once(clock: Clock) -> None:
    outcomes = iter(["done"])

    async def attempt(is_last: bool) -> str:
        return next(outcomes)

    async def stop(outcome: str, within_seconds: float) -> bool:
        return False

    assert await repeat_while_busy(attempt, stop, within_seconds=5.0) == "done"


async def test_an_attempt_is_made_again_until_nothing_is_in_its_way(clock: Clock) -> None:
    outcomes, stopped = iter(["busy", "busy", "done"]), list[str]()

    async def attempt(is_last: bool) -> str:
        return next(outcomes)

    async def stop(outcome: str, within_seconds: float) -> bool:
        stopped.append(outcome)
        return outcome == "busy"

    assert await repeat_while_busy(attempt, stop, within_seconds=5.0) == "done"
    assert stopped == ["busy", "busy", "done"]


async def test_the_outcome_is_returned_as_it_is_when_the_time_is_over(clock: Clock) -> None:
    attempts: list[float] = []

    async def attempt(is_last: bool) -> str:
        attempts.append(clock.now)
        clock.now += 2.0
        return "busy"

    async def stop(outcome: str, within_seconds: float) -> bool:
        return True

    assert await repeat_while_busy(attempt, stop, within_seconds=5.0) == "busy"
    assert attempts == [1000.0, 1002.0, 1004.0, 1006.0]  # the last one began after the time was over


async def test_an_attempt_that_was_made_already_is_not_made_again_first(clock: Clock) -> None:
    outcomes = iter(["done"])

    async def attempt(is_last: bool) -> str:
        return next(outcomes)

    async def stop(outcome: str, within_seconds: float) -> bool:
        assert within_seconds == pytest.approx(5.01)
        return outcome == "busy"

    assert await repeat_while_busy(attempt, stop, within_seconds=5.0, first="busy") == "done"
