"""Which turns a node runs, from when it may be about to run them until it has forgotten them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import cast
from uuid import UUID

import pytest

from anynode.models.database import Database
from anynode.models.events import Entry, Event
from anynode.server import metrics
from anynode.server.agents.agent import AgentEvent, TextDelta, Turn
from anynode.server.engine import journal as journal_module
from anynode.server.engine.cursor import Log
from anynode.server.engine.follow import Follows
from anynode.server.engine.running_turns import RunningTurns
from anynode.server.engine.turn import TurnRunner
from anynode.server.settings import Settings

CONVERSATION = UUID("018f0000-0000-7000-8000-000000000001")
TURN = UUID("018f0000-0000-7000-8000-000000000002")
OTHER_TURN = UUID("018f0000-0000-7000-8000-000000000003")
NO_DATABASE = cast(Database, None)
SETTINGS = Settings(flush_interval_ms=0)


class World:
    """A node's turns; their agent waits behind its first word until it `may_go_on`."""

    def __init__(self) -> None:
        self.follows = Follows(NO_DATABASE, snapshot_messages_max=10)
        self.turns = RunningTurns(SETTINGS, NO_DATABASE, self.follows)
        self.may_go_on = asyncio.Event()
        self.flushed: list[Entry] = []
        self.refused: set[UUID] = set()

    async def _agent(self, turn: Turn) -> AsyncIterator[AgentEvent]:
        yield TextDelta("said")
        await self.may_go_on.wait()

    async def flush(self, database: Database, entries: Sequence[Entry], *, within_seconds: float) -> set[UUID]:
        self.flushed.extend(entries)
        return self.refused & {entry.turn_id for entry in entries}

    async def ended_under(self, database: Database, claims: dict[UUID, int], *, within_seconds: float) -> set[UUID]:
        return set()

    def start(self, turn_id: UUID = TURN, *, epoch: int = 1, trusted_until: float = 0.0) -> TurnRunner:
        """Start a turn whose first event is committed."""
        turn = Turn(turn_id, CONVERSATION, "user", [], attempt=epoch)
        events = [Event(5, "turn.started", str(turn_id), "{}")]
        return self.turns.start(turn, self._agent, events, trusted_until, epoch=epoch)

    async def shown(self, after: int, until: int) -> list[int]:
        """The seqs that a follower is shown, up to one."""
        seqs: list[int] = []
        follow = self.follows.follow("user", CONVERSATION, after, is_own=True)
        async for update in follow:
            seqs += [event.seq for event in cast(Sequence[Event], update)]
            if seqs[-1] >= until:
                break
        await follow.aclose()
        return seqs


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """A node's turns, and the journal that commits what they say."""
    made = World()
    monkeypatch.setattr(journal_module, "flush", made.flush)
    monkeypatch.setattr(journal_module, "ended_under", made.ended_under)
    flushing = asyncio.create_task(made.turns.journal.run())
    yield made
    for running in made.turns.all():
        running.lose()
    await made.turns.wait_ended(5.0)
    flushing.cancel()
    await asyncio.wait((flushing,))


async def test_a_turn_is_known_from_its_start_to_the_commit_of_its_end(world: World) -> None:
    before = metrics.turns_running._value.get()
    running = world.start(trusted_until=42.0)
    assert (world.turns.get(TURN), world.turns.all(), len(world.turns)) == (running, [running], 1)
    assert (running.lease_until, world.turns.known()) == (42.0, {TURN})
    assert metrics.turns_running._value.get() == before + 1
    world.may_go_on.set()
    await world.turns.wait_ended(5.0)
    assert (world.turns.get(TURN), world.turns.all(), len(world.turns), world.turns.known()) == (None, [], 0, set())
    assert metrics.turns_running._value.get() == before


async def test_turns_that_may_be_about_to_run_count_among_those_that_do(world: World) -> None:
    with world.turns.starting(TURN):
        assert len(world.turns) == 1
    assert len(world.turns) == 0


async def test_a_turn_writes_under_its_epoch_behind_what_is_committed(world: World) -> None:
    running = world.start(epoch=3)
    assert running.epoch == 3
    world.may_go_on.set()
    await world.turns.wait_ended(5.0)
    assert {entry.epoch for entry in world.flushed} == {3}
    assert [event.seq for entry in world.flushed for event in entry.events] == [6, 7]


async def test_followers_are_shown_what_is_committed(world: World) -> None:
    world.start()
    world.may_go_on.set()
    assert await world.shown(4, 7) == [5, 6, 7]


async def test_a_turn_that_is_started_again_loses_its_earlier_run_and_keeps_its_place(world: World) -> None:
    earlier = world.start()
    later = world.start(epoch=2)
    assert not await earlier.journal.closed
    await asyncio.wait((earlier.journal.closed,))
    assert world.turns.get(TURN) is later
    world.may_go_on.set()
    assert await later.journal.closed


async def test_the_log_of_a_turn_that_was_lost_is_not_taken_for_the_whole_of_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    wholes: list[bool] = []
    end_log = Follows.end_log

    def noticed(follows: Follows, conversation_id: UUID, log: Log, *, is_whole: bool = True) -> None:
        wholes.append(is_whole)
        end_log(follows, conversation_id, log, is_whole=is_whole)

    monkeypatch.setattr(Follows, "end_log", noticed)
    world.refused = {TURN}
    lost = metrics.turns_lost._value.get()
    running = world.start()
    assert not await running.journal.closed
    await world.turns.wait_ended(5.0)
    assert wholes == [False]
    assert metrics.turns_lost._value.get() == lost + 1


async def test_a_turn_that_may_be_about_to_start_is_known(world: World) -> None:
    with world.turns.starting(TURN, OTHER_TURN):
        assert world.turns.known() == {TURN, OTHER_TURN}
    assert world.turns.known() == set()


async def test_work_in_which_a_turn_may_start_makes_it_known_at_once(world: World) -> None:
    may_end = asyncio.Event()

    async def work() -> None:
        await may_end.wait()

    world.turns.spawn(work(), TURN)
    assert world.turns.known() == {TURN}
    may_end.set()
    await world.turns.wait_ended(5.0)
    assert world.turns.known() == set()


async def test_the_end_is_waited_for_only_so_long(world: World) -> None:
    running = world.start()
    await world.turns.wait_ended(0.0)
    assert world.turns.all() == [running]


async def test_a_turn_that_is_about_to_start_is_waited_for(world: World) -> None:
    starting = world.turns.starting(TURN)
    starting.__enter__()
    waiting = asyncio.create_task(world.turns.wait_ended(60.0))
    await asyncio.wait((waiting,), timeout=0)
    running = world.start()
    starting.__exit__(None, None, None)
    assert not waiting.done()
    world.may_go_on.set()
    await waiting
    assert await running.journal.closed
