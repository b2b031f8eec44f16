"""How long a node trusts a lease, what becomes of its turns after a renewal, and how it takes turns over."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, cast
from uuid import UUID

import pytest

from anynode.models.admissions import StoredMessage
from anynode.models.database import Database, Unavailable
from anynode.models.events import Entry, Event
from anynode.models.turns import TakenTurn
from anynode.server.agents.agent import (
    Agent,
    AgentEvent,
    TextDelta,
    Turn,
    continues,
    resumes_calls,
)
from anynode.server.engine import journal as journal_module
from anynode.server.engine import leases as module
from anynode.server.engine.follow import Follows
from anynode.server.engine.leases import TAKEOVERS_AT_ONCE, LeaseClock, Leases, Renewal, renewal_of
from anynode.server.engine.running_turns import RunningTurns
from anynode.server.engine.turn import TurnRunner
from anynode.server.settings import Settings

CONVERSATION = UUID("018f0000-0000-7000-8000-000000000001")
TURN = UUID("018f0000-0000-7000-8000-000000000002")
OTHER_TURN = UUID("018f0000-0000-7000-8000-000000000003")
NO_DATABASE = cast(Database, None)
FOR_EVER = float("inf")


# How long a lease is trusted.


def test_a_lease_that_was_never_requested_is_not_trusted() -> None:
    assert LeaseClock(4.0).trusted_until == 0


def test_a_lease_is_trusted_from_when_it_was_requested_however_late_the_answer_comes() -> None:
    lease = LeaseClock(4.0)
    lease.start(110.0)
    assert lease.trusted_until == 114.0


def test_where_the_request_was_repeated_the_first_may_have_been_heard() -> None:
    lease = LeaseClock(4.0)
    lease.start(100.0)
    lease.start(103.0)
    assert lease.trusted_until == 104.0


def test_a_lease_may_be_requested_when_the_clock_begins() -> None:
    lease = LeaseClock(4.0)
    lease.start(0.0)
    lease.start(3.0)
    assert lease.trusted_until == 4.0


# What becomes of a turn after a renewal.


@pytest.mark.parametrize(
    ("cancel_requested", "is_lost", "is_closed", "is_ending", "expected"),
    [
        (False, False, False, False, "keep"),
        (True, False, False, False, "cancel"),
        (None, False, False, False, "lose"),
        # Its end is on its way: the lease is kept for it, and where there is none the flush says whose the turn is.
        (False, False, False, True, "keep"),
        (True, False, False, True, "cancel"),
        (None, False, False, True, "leave"),
        # It has ended meanwhile.
        (False, False, True, True, "leave"),
        (True, False, True, True, "leave"),
        (None, False, True, True, "leave"),
        # It was lost meanwhile.
        (False, True, True, False, "give back"),
        (True, True, True, False, "give back"),
        (None, True, True, False, "leave"),
    ],
)
def test_what_becomes_of_a_turn_after_a_renewal(
    cancel_requested: bool | None, is_lost: bool, is_closed: bool, is_ending: bool, expected: Renewal
) -> None:
    assert renewal_of(cancel_requested, is_lost=is_lost, is_closed=is_closed, is_ending=is_ending) == expected


# A node's leases.


class World:
    """A node's turns and leases, and a Postgres that does what the test says."""

    def __init__(self, agent: Agent, **settings: Any) -> None:
        defaults = Settings(flush_interval_ms=0, lease_seconds=10.0, max_attempts=3, system_prompt="be kind")
        self.agent = agent
        self.settings = replace(defaults, **settings)
        self.follows = Follows(NO_DATABASE, snapshot_messages_max=10)
        self.turns = RunningTurns(self.settings, NO_DATABASE, self.follows)
        self.leases = Leases(self.settings, NO_DATABASE, self.turns, node_id="node", agent=agent)
        self.renewals: asyncio.Queue[tuple[Mapping[UUID, int], asyncio.Future[dict[UUID, bool]]]] = asyncio.Queue()
        self.released: asyncio.Queue[Mapping[UUID, int]] = asyncio.Queue()
        self.takeovers: asyncio.Queue[tuple[dict[str, Any], asyncio.Future[list[TakenTurn]]]] = asyncio.Queue()
        self.history: tuple[str | None, list[StoredMessage], bool] | None = (
            None,
            [StoredMessage("user", "question")],
            False,
        )
        self.history_fault: Exception | None = None
        self.flushed: list[Entry] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def flush(self, database: Database, entries: Sequence[Entry], *, within_seconds: float) -> set[UUID]:
        self.flushed.extend(entries)
        return set()

    async def renew_leases(
        self, database: Database, claims: Mapping[UUID, int], *, lease_seconds: float, within_seconds: float
    ) -> dict[UUID, bool]:
        answer: asyncio.Future[dict[UUID, bool]] = asyncio.get_running_loop().create_future()
        await self.renewals.put((claims, answer))
        return await answer

    async def release_leases(self, database: Database, claims: Mapping[UUID, int]) -> None:
        await self.released.put(claims)

    async def take_over(self, database: Database, **arguments: Any) -> list[TakenTurn]:
        answer: asyncio.Future[list[TakenTurn]] = asyncio.get_running_loop().create_future()
        await self.takeovers.put((arguments, answer))
        return await answer

    async def read_history(
        self, database: Database, conversation_id: UUID, *, messages_max: int
    ) -> tuple[str | None, list[StoredMessage], bool] | None:
        if self.history_fault is not None:
            raise self.history_fault
        return self.history

    def run(self, *tasks: Any) -> None:
        """Run tasks of the node, until the test is over."""
        self._tasks += [asyncio.create_task(task) for task in tasks]

    def start(self, turn_id: UUID = TURN, *, epoch: int = 1, trusted_until: float = FOR_EVER) -> TurnRunner:
        """Start a turn."""
        turn = Turn(turn_id, CONVERSATION, "user", [], attempt=epoch)
        event = Event(5, "turn.started", str(turn_id), "{}")
        return self.turns.start(turn, self.agent, [event], trusted_until, epoch=epoch)

    async def taken(self, *turns: TakenTurn) -> None:
        """Answer the takeover that is under way, and run what was taken over to its end."""
        arguments, answer = await self.takeovers.get()
        arguments["on_sent"]()
        answer.set_result(list(turns))
        await self.turns.wait_ended(5.0)

    async def stop(self) -> None:
        """End everything."""
        for running in self.turns.all():
            running.lose()
        for task in self._tasks:
            task.cancel()
        await self.turns.wait_ended(5.0)
        await asyncio.wait(self._tasks)

    def said(self) -> list[tuple[str, Any]]:
        """The type and payload of everything that was committed."""
        return [(event.type, json.loads(event.payload)) for entry in self.flushed for event in entry.events]


Make = Callable[..., World]


@pytest.fixture
async def make(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Make]:
    """Makes a node, with its journal running."""
    made: list[World] = []

    def new(agent: Agent, **settings: Any) -> World:
        world = World(agent, **settings)
        made.append(world)
        monkeypatch.setattr(journal_module, "flush", world.flush)
        for name in ("renew_leases", "release_leases", "take_over", "read_history"):
            monkeypatch.setattr(module, name, getattr(world, name))
        world.run(world.turns.journal.run())
        return world

    yield new
    for world in made:
        await world.stop()


async def silent(turn: Turn) -> AsyncIterator[AgentEvent]:
    """An agent that never says anything."""
    await asyncio.Event().wait()
    yield TextDelta("never")


async def quick(turn: Turn) -> AsyncIterator[AgentEvent]:
    """An agent that says what it was given."""
    yield TextDelta(f"{turn.attempt} {[message.content for message in turn.history]} {turn.partial!r} ")
    yield TextDelta(f"{[message.content for message in turn.steps]} {[call.tool_call_id for call in turn.pending]}")


async def test_a_lease_is_trusted_for_four_fifths_of_its_duration(make: Make) -> None:
    lease = make(silent).leases.new()
    lease.start(100.0)
    assert lease.trusted_until == 108.0


async def test_a_beat_renews_the_leases_of_all_turns_under_their_epochs(make: Make) -> None:
    world = make(silent)
    turn, other = world.start(), world.start(OTHER_TURN, epoch=3)
    world.run(world.leases.beat())
    before = time.monotonic()
    claims, answer = await world.renewals.get()
    assert claims == {TURN: 1, OTHER_TURN: 3}
    after = time.monotonic()
    answer.set_result({TURN: False, OTHER_TURN: True})
    assert await other.journal.closed  # it was to be cancelled
    assert before + 7 < turn.lease_until <= after + 8
    assert turn.journal.closed.done() is False
    assert world.said()[-1][0] == "turn.cancelled"


async def test_a_turn_whose_lease_is_not_renewed_is_lost(make: Make) -> None:
    world = make(silent)
    turn = world.start()
    world.run(world.leases.beat())
    _, answer = await world.renewals.get()
    answer.set_result({})
    assert not await turn.journal.closed
    assert world.released.empty()


async def test_a_turn_that_was_lost_while_its_lease_was_renewed_is_given_back(make: Make) -> None:
    world = make(silent)
    turn = world.start(epoch=2)
    world.run(world.leases.beat())
    _, answer = await world.renewals.get()
    turn.lose()
    answer.set_result({TURN: False})
    assert await world.released.get() == {TURN: 2}


async def test_a_lease_that_has_run_out_is_not_renewed(make: Make) -> None:
    world = make(silent)
    world.start(trusted_until=0.0)
    world.start(OTHER_TURN)
    world.run(world.leases.beat())
    assert (await world.renewals.get())[0] == {OTHER_TURN: 1}


async def test_a_beat_that_fails_loses_nothing_and_still_looks_for_lapsed_leases(make: Make) -> None:
    world = make(silent)
    turn = world.start()
    world.run(world.leases.beat(), world.leases.take_over_lapsed())
    _, answer = await world.renewals.get()
    answer.set_exception(Unavailable("no answer"))
    await world.takeovers.get()
    assert not turn.journal.closed.done()


async def test_a_turn_whose_lease_has_run_out_is_given_up(make: Make) -> None:
    world = make(silent, lease_seconds=0.02)  # one look each millisecond
    kept, dropped = world.start(), world.start(OTHER_TURN, trusted_until=time.monotonic())
    world.run(world.leases.drop_lapsed())
    assert not await dropped.journal.closed
    assert not kept.journal.closed.done()


# Takeover.


def taken(journal: Sequence[tuple[str, Any]] = (), text: str = "", **fields: Any) -> TakenTurn:
    """A turn that was taken over for the second time."""
    return TakenTurn(
        turn_id=TURN,
        conversation_id=CONVERSATION,
        user_id="user",
        epoch=3,
        seq=20,
        text=text,
        standing_events=[(type, json.dumps(payload)) for type, payload in journal],
        **{"cancel_requested": False, "is_exhausted": False, "agent_is_gone": False, **fields},
    )


CALL = ("turn.tool_call", {"tool_call_id": "1", "tool_name": "search", "arguments": {}})
RESULT = ("turn.tool_result", {"tool_call_id": "1", "tool_name": "search", "content": "found", "is_error": False})
OTHER_CALL = ("turn.tool_call", {"tool_call_id": "2", "tool_name": "search", "arguments": {}})


async def test_a_turn_that_is_taken_over_goes_on_behind_what_stands(make: Make) -> None:
    world = make(continues(quick))
    world.run(world.leases.take_over_lapsed())
    world.leases.take_over_soon()
    journal = [("turn.delta", {"text": "look"}), CALL, RESULT, ("turn.delta", {"text": "par"})]
    await world.taken(taken(journal, "lookpar"))
    assert {entry.epoch for entry in world.flushed} == {3}
    assert world.flushed[0].events[0].seq == 21  # behind the `turn.restarted` that the takeover has committed
    said = "".join(payload["text"] for type, payload in world.said() if type == "turn.delta")
    assert said == "3 ['be kind', 'question'] 'par' ['look', 'found'] []"
    ending = world.flushed[-1].ending
    assert ending is not None
    assert [message.content for message in ending.messages] == ["look", "found", f"par{said}"]


class Asked:
    """An agent that says nothing, and that tells when it is asked."""

    def __init__(self) -> None:
        self.is_asked = asyncio.Event()

    async def __call__(self, turn: Turn) -> AsyncIterator[AgentEvent]:
        self.is_asked.set()
        await asyncio.Event().wait()
        yield TextDelta("never")


async def test_followers_are_shown_that_a_turn_was_restarted(make: Make) -> None:
    agent = Asked()
    world = make(agent)
    world.run(world.leases.take_over_lapsed())
    world.leases.take_over_soon()
    _, answer = await world.takeovers.get()
    answer.set_result([taken([("turn.delta", {"text": "one"})], "")])
    await agent.is_asked.wait()
    async with aclosing(world.follows.follow("user", CONVERSATION, 19, is_own=True)) as updates:
        (event,) = cast(Sequence[Event], await anext(updates))
    assert (event.seq, event.type, event.turn_id) == (20, "turn.restarted", str(TURN))
    assert json.loads(event.payload) == {"epoch": 3, "text": ""}  # this agent says it anew


@pytest.mark.parametrize(("agent", "expected"), [(quick, "[]"), (resumes_calls(lambda turn: quick(turn)), "['2']")])
async def test_only_an_agent_that_resumes_calls_is_given_those_that_are_pending(
    make: Make, agent: Agent, expected: str
) -> None:
    world = make(agent)
    world.run(world.leases.take_over_lapsed())
    world.leases.take_over_soon()
    await world.taken(taken([CALL, RESULT, OTHER_CALL]))
    assert world.said()[-2][1]["text"].endswith(f" {expected}")


async def test_the_conversations_own_prompt_goes_before_that_of_the_settings(make: Make) -> None:
    world = make(quick)
    world.history = ("be brief", [StoredMessage("user", "question")], False)
    world.run(world.leases.take_over_lapsed())
    world.leases.take_over_soon()
    await world.taken(taken())
    assert "['be brief', 'question']" in world.said()[0][1]["text"]


async def test_a_turn_that_was_to_be_cancelled_is_cancelled_with_what_stands(make: Make) -> None:
    world = make(quick)
    world.run(world.leases.take_over_lapsed())
    world.leases.take_over_soon()
    await world.taken(taken([("turn.delta", {"text": "par"})], "par", cancel_requested=True, is_exhausted=True))
    ((type, payload),) = world.said()
    assert (type, payload["message"]["content"]) == ("turn.cancelled", "par")


async def test_a_turn_of_which_too_many_nodes_have_died_fails(make: Make) -> None:
    world = make(quick)
    world.run(world.leases.take_over_lapsed())
    world.leases.take_over_soon()
    await world.taken(taken([("turn.delta", {"text": "par"})], "par", is_exhausted=True))
    ((type, payload),) = world.said()
    assert (type, payload["message"]["content"]) == ("turn.failed", "par")
    assert payload["error"]["message"] == "The answer was interrupted 3 times."
    assert payload["error"]["retryable"]


async def test_a_turn_whose_agent_is_gone_fails_with_what_it_has_said_and_no_other_agent_is_asked(make: Make) -> None:
    agent = Asked()
    world = make(agent)
    world.run(world.leases.take_over_lapsed())
    world.leases.take_over_soon()
    await world.taken(taken([("turn.delta", {"text": "par"})], "par", agent_is_gone=True))
    ((type, payload),) = world.said()
    assert (type, payload["message"]["content"]) == ("turn.failed", "par")
    assert payload["error"] == {"code": "agent_failed", "message": module.OWNER_GONE, "retryable": True}
    assert not agent.is_asked.is_set()


async def test_the_turn_of_a_conversation_is_taken_over_for_an_agent_that_is_given(make: Make) -> None:
    other = Asked()
    world = make(other)
    taking = asyncio.create_task(world.leases.take_over_turn(CONVERSATION, continues(quick)))
    arguments, answer = await world.takeovers.get()
    arguments["on_sent"]()
    assert arguments["conversation_id"] == CONVERSATION
    assert "turn.delta" in arguments["stands_up_to"]  # as the given agent can continue
    answer.set_result([taken([("turn.delta", {"text": "par"})], "par")])
    assert await taking
    await world.turns.wait_ended(5.0)
    assert world.said()[0] == ("turn.delta", {"text": "3 ['be kind', 'question'] 'par' [] []"})
    assert not other.is_asked.is_set()


async def test_the_turn_of_a_conversation_ends_as_failed_without_an_agent(make: Make) -> None:
    world = make(quick)
    taking = asyncio.create_task(world.leases.take_over_turn(CONVERSATION, None))
    arguments, answer = await world.takeovers.get()
    arguments["on_sent"]()
    assert arguments["max_attempts"] == 0  # so all that was said is kept
    answer.set_result([taken([("turn.delta", {"text": "par"})], "par", is_exhausted=True)])
    assert await taking
    await world.turns.wait_ended(5.0)
    ((type, payload),) = world.said()
    assert (type, payload["message"]["content"], payload["error"]["message"]) == (
        "turn.failed",
        "par",
        module.OWNER_GONE,
    )


async def test_a_conversation_whose_turn_has_not_lapsed_has_nothing_to_take_over(make: Make) -> None:
    world = make(quick)
    taking = asyncio.create_task(world.leases.take_over_turn(CONVERSATION, quick))
    _, answer = await world.takeovers.get()
    answer.set_result([])
    assert not await taking


@pytest.mark.parametrize(("stored", "is_cut"), [(10, False), (11, True)])
async def test_a_turn_that_is_taken_over_is_told_whether_its_history_is_cut(
    make: Make, stored: int, is_cut: bool
) -> None:
    seen: list[Turn] = []

    async def agent(turn: Turn) -> AsyncIterator[AgentEvent]:
        seen.append(turn)
        yield TextDelta("x")

    world = make(agent, history_messages_max=10)
    world.history = (None, [StoredMessage("user", str(number)) for number in range(stored)], False)
    world.run(world.leases.take_over_lapsed())
    world.leases.take_over_soon()
    await world.taken(taken())
    assert seen[0].history_is_cut == is_cut
    assert [message.content for message in seen[0].history] == ["be kind", *map(str, range(stored - 10, stored))]


async def test_a_turn_whose_journal_cannot_be_read_fails_with_the_text_that_is_shown(make: Make) -> None:
    world = make(quick)
    world.run(world.leases.take_over_lapsed())
    world.leases.take_over_soon()
    await world.taken(taken([RESULT], "par"))
    ((type, payload),) = world.said()
    assert (type, payload["message"]["content"], payload["error"]["retryable"]) == ("turn.failed", "par", False)


@pytest.mark.parametrize("fault", [None, Unavailable("no answer")])
async def test_a_turn_whose_history_is_not_there_is_left(make: Make, fault: Exception | None) -> None:
    world = make(quick)
    world.history, world.history_fault = None, fault
    world.run(world.leases.take_over_lapsed())
    world.leases.take_over_soon()
    await world.taken(taken())
    assert (world.turns.all(), world.said()) == ([], [])


async def test_the_lease_of_a_taken_turn_is_trusted_from_when_it_was_requested(make: Make) -> None:
    agent = Asked()
    world = make(agent)
    world.run(world.leases.take_over_lapsed())
    world.leases.take_over_soon()
    arguments, answer = await world.takeovers.get()
    before = time.monotonic()
    arguments["on_sent"]()
    after = time.monotonic()
    answer.set_result([taken()])
    await agent.is_asked.wait()
    running = world.turns.get(TURN)
    assert running is not None
    assert before + 8 <= running.lease_until <= after + 8


async def test_a_takeover_names_the_turns_that_are_known_here(make: Make) -> None:
    world = make(silent)
    world.start()
    world.run(world.leases.take_over_lapsed())
    with world.turns.starting(OTHER_TURN):
        world.leases.take_over_soon()
        arguments, answer = await world.takeovers.get()
    assert arguments["known"] == {TURN, OTHER_TURN}
    assert (arguments["node"], arguments["limit"], arguments["max_attempts"]) == ("node", TAKEOVERS_AT_ONCE, 3)
    answer.set_result([])


async def test_as_long_as_there_are_more_the_next_are_taken_over_at_once(make: Make) -> None:
    world = make(quick)
    world.history = None
    world.run(world.leases.take_over_lapsed())
    world.leases.take_over_soon()
    _, answer = await world.takeovers.get()
    answer.set_result([taken()] * TAKEOVERS_AT_ONCE)
    await world.taken()
    assert world.takeovers.empty()


async def test_a_node_that_drains_takes_no_more_over(make: Make) -> None:
    world = make(quick)
    world.history = None
    world.run(world.leases.take_over_lapsed())
    world.leases.take_over_soon()
    _, answer = await world.takeovers.get()
    world.leases.may_take_over = False
    answer.set_result([taken()] * TAKEOVERS_AT_ONCE)
    await world.turns.wait_ended(5.0)
    assert world.takeovers.empty()


async def test_a_takeover_that_fails_is_tried_again(make: Make) -> None:
    world = make(quick)
    world.run(world.leases.take_over_lapsed())
    for fault in (Unavailable("no answer"), ValueError("no sense")):
        world.leases.take_over_soon()
        _, answer = await world.takeovers.get()
        answer.set_exception(fault)
        await asyncio.wait((answer,))
    world.leases.take_over_soon()
    await world.taken(taken())
    assert world.said()[-1][0] == "turn.completed"


async def test_leases_that_cannot_be_released_lapse(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(database: Database, claims: Mapping[UUID, int]) -> None:
        raise Unavailable("no answer")

    world = make(silent)
    monkeypatch.setattr(module, "release_leases", fail)
    await world.leases.release([world.start()])
