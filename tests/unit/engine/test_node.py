"""A node: what it admits, what it stops for that, and how it drains; with what runs and follows turns replaced."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID

import pytest

from anynode.models.admissions import Admission, Question, StoredMessage
from anynode.models.database import Database, Unavailable
from anynode.models.events import Event
from anynode.models.messages import AppendOutcome
from anynode.models.turns import CancelRequest
from anynode.server.agents.agent import Agent, AgentEvent, HistoryMessage, TextDelta, Turn
from anynode.server.agents.echo import make_echo
from anynode.server.engine import conversations, interrupts
from anynode.server.engine import node as module
from anynode.server.engine.interrupts import Interrupts
from anynode.server.engine.node import Node
from anynode.server.errors import ConversationBusy, DatabaseUnavailable, Draining, NotFound, RateLimited
from anynode.server.protocol.bodies import UserMessage
from anynode.server.protocol.frames import MessageSend, TurnRegenerate
from anynode.server.settings import Settings
from tests.kit.turns import CONVERSATION, FIRST_SEQ, OTHER_TURN, TURN, USER, message, turn_ref

SEND = MessageSend("m-1", "hello", CONVERSATION)
INTERRUPT = MessageSend("m-1", "hello", CONVERSATION, if_busy="interrupt")
REGENERATE = TurnRegenerate(CONVERSATION, "m-1")
HISTORY = [StoredMessage("user", "hello")]
BUSY = Admission("conversation_busy", CONVERSATION, OTHER_TURN)
REPEATED = Admission("repeated", CONVERSATION, TURN, FIRST_SEQ)
SEQ = 77
ADMITTED = Admission("admitted", CONVERSATION, TURN, FIRST_SEQ, history=HISTORY, client_message_id="m-1")


class Told:
    """Takes every call, and keeps it. What a call returns takes every call too."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.may_take_over = True

    def __getattr__(self, name: str) -> Any:
        def called(*arguments: object) -> Told:
            self.calls.append((name, *arguments))
            return Told()

        return called


class Leases(Told):
    """The leases of a node; `on_release` is told of the turns that are handed over."""

    def __init__(self) -> None:
        super().__init__()
        self.on_release: Callable[[list[Told]], object] = lambda turns: None

    async def release(self, turns: list[Told]) -> None:
        self.calls.append(("release", turns))
        self.on_release(turns)


class Loops:
    """Parts of a node that go on for ever, whatever they are called, but for the one that is `broken`."""

    def __init__(self, broken: str = "") -> None:
        self.broken = broken
        self.begun: dict[str, dict[str, Any]] = {}  # with their keyword arguments

    def __getattr__(self, name: str) -> Any:
        async def loop(*arguments: object, **options: object) -> None:
            assert name not in self.begun
            self.begun[name] = options
            if name == self.broken:
                raise KeyError(name)
            await asyncio.Event().wait()

        return loop


class Clock:
    """The monotonic clock, for tests to set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        for each in (module, interrupts):
            monkeypatch.setattr(each, "time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class Running:
    """The turns of a node, as far as the node speaks with them."""

    def __init__(self) -> None:
        self.turns: dict[UUID, Told] = {}
        self.started: list[tuple[Turn, list[Event]]] = []
        self.agents: list[Agent] = []
        self.to_start: set[UUID] = set()
        self.waited: list[float] = []
        self.journal: Any = None

    def __len__(self) -> int:
        return len(self.turns)

    def get(self, turn_id: UUID) -> Told | None:
        return self.turns.get(turn_id)

    def all(self) -> list[Told]:
        return list(self.turns.values())

    @contextmanager
    def starting(self, *turn_ids: UUID) -> Iterator[None]:
        self.to_start.update(turn_ids)
        yield
        self.to_start.difference_update(turn_ids)

    def start(self, turn: Turn, agent: Agent, events: list[Event], *lease: object) -> None:
        self.started.append((turn, events))
        self.agents.append(agent)

    async def wait_ended(self, within_seconds: float) -> None:
        self.waited.append(within_seconds)


class Postgres:
    """What the database's functions answer, one after the other, to this node; errors are raised."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.admissions: list[Admission | Exception] = []
        self.asked: list[Any] = []  # questions, and ids of turns that regenerate
        self.cancelled: list[tuple[UUID, UUID | None]] = []
        self.cancels: CancelRequest | Exception | None = CancelRequest(OTHER_TURN, SEQ)
        self.deletions: list[str | Callable[[], str]] = []
        self.forced: list[bool] = []
        self.during: Callable[[], object] = lambda: None  # what happens while a question is admitted
        for name in ("admit", "regenerate", "request_cancel", "delete_conversation"):
            monkeypatch.setattr(module, name, getattr(self, f"_{name}"))

    async def _admit(self, database: Database, question: Question, **terms: Any) -> Admission:
        self.asked.append(question)
        return self._next(terms)

    async def _regenerate(
        self, database: Database, user_id: str, conversation_id: UUID, client_id: str | None, **terms: Any
    ) -> Admission:
        self.asked.append((user_id, conversation_id, client_id, terms.pop("turn_id"), terms.pop("created_at")))
        return self._next(terms)

    def _next(self, terms: dict[str, Any]) -> Admission:
        terms.pop("on_sent")()
        assert terms == {"node": "test", "lease_seconds": 5.0, "history_messages_max": 201, "limits": None}
        self.during()
        admission = self.admissions.pop(0)
        if isinstance(admission, Exception):
            raise admission
        return admission

    async def _request_cancel(
        self, database: Database, user_id: str, conversation_id: UUID, turn_id: UUID | None
    ) -> CancelRequest | None:
        self.cancelled.append((conversation_id, turn_id))
        if isinstance(self.cancels, Exception):
            raise self.cancels
        return self.cancels

    async def _delete_conversation(
        self, database: Database, user_id: str, conversation_id: UUID, *, is_forced: bool
    ) -> str:
        self.forced.append(is_forced)
        deletion = self.deletions.pop(0)
        return deletion if isinstance(deletion, str) else deletion()


@pytest.fixture
def postgres(monkeypatch: pytest.MonkeyPatch) -> Postgres:
    return Postgres(monkeypatch)


def node_of(running: Running | None = None, **settings: Any) -> Node:
    """A node whose turns are replaced."""
    told = Settings(**settings)
    node = Node(told, cast(Database, None), make_echo(told))
    node.node_id = "test"
    node._running = cast(Any, Running() if running is None else running)
    node._leases = cast(Any, Leases())
    node.follows = cast(Any, Told())
    node._interrupts = Ends(node)
    return node


class Ends(Interrupts):
    """The waits for the ends of turns, which are over at once."""

    def __init__(self, node: Node) -> None:
        super().__init__(node.follows, node.draining)
        self.waited: list[tuple[UUID, UUID, int, float]] = []

    async def wait_end(
        self, user_id: str, conversation_id: UUID, turn_id: UUID, after: int, *, within_seconds: float
    ) -> None:
        self.waited.append((conversation_id, turn_id, after, within_seconds))


def waits_of(node: Node) -> list[tuple[UUID, UUID, int, float]]:
    """The conversations, turns and seqs behind which the node has waited for an end, and for how long at most."""
    return cast(Ends, node._interrupts).waited


def calls_of(part: object) -> list[tuple[Any, ...]]:
    return cast(Told, part).calls


# Sending.


async def test_a_message_that_is_admitted_runs_its_turn_behind_the_two_events_that_are_committed(
    postgres: Postgres,
) -> None:
    running = Running()
    postgres.admissions = [ADMITTED]
    postgres.during = lambda: postgres.asked.append(set(running.to_start))
    node = node_of(running)
    admitted = await node.send(USER, SEND)
    assert (admitted.turn, admitted.is_new) == (turn_ref(), True)
    question, to_start = postgres.asked
    assert to_start == {question.turn_id}  # a drain would wait for it
    assert running.to_start == set()
    ((turn, events),) = running.started
    assert (turn.turn_id, turn.conversation_id, turn.user_id, turn.attempt) == (TURN, CONVERSATION, USER, 1)
    assert turn.history == [HistoryMessage("user", "hello")]
    assert [(event.seq, event.type, event.turn_id) for event in events] == [
        (FIRST_SEQ, "message.created", str(TURN)),
        (FIRST_SEQ + 1, "turn.started", str(TURN)),
    ]
    assert [event.payload for event in events] == [question.message_created, question.turn_started]


async def test_a_chats_id_goes_with_the_question(postgres: Postgres) -> None:
    postgres.admissions = [ADMITTED]
    await node_of().send(USER, SEND, client_chat_id="chat-1")
    assert postgres.asked[0].client_chat_id == "chat-1"


@pytest.mark.parametrize(
    ("own", "nodes", "expected"),
    [(None, None, []), (None, "of the node", ["of the node"]), ("its own", "of the node", ["its own"])],
)
async def test_a_conversation_has_its_own_system_prompt_or_the_nodes(
    postgres: Postgres, own: str | None, nodes: str | None, expected: list[str]
) -> None:
    running = Running()
    postgres.admissions = [Admission("admitted", CONVERSATION, TURN, FIRST_SEQ, system_prompt=own, history=HISTORY)]
    await node_of(running, system_prompt=nodes).send(USER, SEND)
    history = running.started[0][0].history
    assert [message.content for message in history if message.role == "system"] == expected


@pytest.mark.parametrize(("stored", "is_cut"), [(200, False), (201, True)])
async def test_a_turn_is_told_whether_its_history_is_cut(postgres: Postgres, stored: int, is_cut: bool) -> None:
    running = Running()
    history = [StoredMessage("user", str(number)) for number in range(stored)]
    postgres.admissions = [Admission("admitted", CONVERSATION, TURN, FIRST_SEQ, history=history)]
    await node_of(running).send(USER, SEND)
    turn = running.started[0][0]
    assert turn.history_is_cut == is_cut
    assert [message.content for message in turn.history] == [str(number) for number in range(stored - 200, stored)]


async def test_a_message_may_bring_the_agent_that_answers_it(postgres: Postgres) -> None:
    async def agent(turn: Turn) -> AsyncIterator[AgentEvent]:
        yield TextDelta("")

    running = Running()
    postgres.admissions = [ADMITTED]
    await node_of(running).send(USER, SEND, agent=agent)
    assert running.agents == [agent]


@pytest.mark.parametrize("admission", [REPEATED, Admission("admitted", CONVERSATION, TURN, None)])
async def test_a_turn_that_was_begun_before_is_not_begun_again(postgres: Postgres, admission: Admission) -> None:
    running = Running()
    postgres.admissions = [admission]
    assert (await node_of(running).send(USER, SEND)).turn.turn_id == TURN
    assert running.started == []


async def test_a_turn_that_was_taken_over_here_before_the_answer_came_is_not_begun_again(postgres: Postgres) -> None:
    running = Running()
    running.turns[TURN] = Told()
    postgres.admissions = [ADMITTED]
    await node_of(running).send(USER, SEND)
    assert running.started == []


@pytest.mark.parametrize("ask", ["send", "regenerate"])
async def test_a_postgres_that_does_not_answer_is_told_with_the_conversation(postgres: Postgres, ask: str) -> None:
    postgres.admissions = [Unavailable()]
    node = node_of()
    with pytest.raises(DatabaseUnavailable) as refused:
        await (node.send(USER, SEND) if ask == "send" else node.regenerate(USER, REGENERATE))
    assert refused.value.conversation_id == CONVERSATION


@pytest.mark.parametrize("ask", ["send", "regenerate"])
async def test_a_node_that_drains_or_is_full_asks_nothing_of_postgres(postgres: Postgres, ask: str) -> None:
    running = Running()
    node = node_of(running, turns_max=1)
    running.turns[OTHER_TURN] = Told()
    with pytest.raises(RateLimited, match="at its limit of running turns") as refused:
        await (node.send(USER, SEND) if ask == "send" else node.regenerate(USER, REGENERATE))
    assert refused.value.conversation_id == CONVERSATION
    node.draining.set()
    assert node.is_draining
    with pytest.raises(Draining) as drained:
        await (node.send(USER, SEND) if ask == "send" else node.regenerate(USER, REGENERATE))
    assert drained.value.conversation_id == CONVERSATION
    assert postgres.asked == []


# A turn in the way.


async def test_a_message_to_a_running_turn_is_refused_and_stops_nothing(postgres: Postgres) -> None:
    postgres.admissions = [BUSY]
    with pytest.raises(ConversationBusy):
        await node_of().send(USER, SEND)
    assert postgres.cancelled == []


async def test_a_message_that_interrupts_stops_the_turn_and_is_admitted_after_its_end(
    postgres: Postgres, clock: Clock
) -> None:
    running = Running()
    here = running.turns[OTHER_TURN] = Told()
    postgres.admissions = [BUSY, ADMITTED]
    node = node_of(running)
    admitted = await node.send(USER, INTERRUPT)
    assert admitted.is_new
    assert postgres.cancelled == [(CONVERSATION, OTHER_TURN)]
    ((*waited, seconds),) = waits_of(node)
    assert waited == [CONVERSATION, OTHER_TURN, SEQ]
    assert 10.0 <= seconds < 10.1  # LEASE_SECONDS is 5, INTERRUPT_SECONDS are 5
    assert here.calls == [("cancel",)]
    questions = postgres.asked
    assert len({question.turn_id for question in questions}) == 2  # the ids are in the order of the conversation
    assert len(running.started) == 1


async def test_a_turn_that_has_ended_by_the_time_it_is_asked_to_stop_is_not_waited_for(
    postgres: Postgres, clock: Clock
) -> None:
    postgres.cancels = CancelRequest(OTHER_TURN, None)
    postgres.admissions = [BUSY, ADMITTED]
    node = node_of()
    assert (await node.send(USER, INTERRUPT)).is_new
    assert waits_of(node) == []


async def test_of_messages_that_interrupt_at_once_one_is_admitted_after_the_other(
    postgres: Postgres, clock: Clock
) -> None:
    going_on = asyncio.Event()
    node = node_of()
    ends = cast(Ends, node._interrupts)
    wait_end = ends.wait_end

    async def wait(*arguments: Any, **options: Any) -> None:
        await wait_end(*arguments, **options)
        await going_on.wait()

    ends.wait_end = wait  # type: ignore[method-assign]
    postgres.admissions = [BUSY] * 3
    sending = [asyncio.create_task(node.send(USER, INTERRUPT)) for _ in range(3)]
    for _ in range(20):
        await asyncio.sleep(0)
    assert (len(postgres.asked), len(ends.waited)) == (3, 1)
    postgres.admissions = [ADMITTED, BUSY, ADMITTED, BUSY, ADMITTED]
    going_on.set()
    assert [(await each).is_new for each in sending] == [True] * 3
    assert len(ends.waited) == 3
    assert ends._queues == {}


async def test_a_message_that_interrupts_stops_each_turn_that_comes_into_its_way(
    postgres: Postgres, clock: Clock
) -> None:
    postgres.admissions = [BUSY, Admission("conversation_busy", CONVERSATION, TURN), ADMITTED]
    await node_of().send(USER, INTERRUPT)
    assert postgres.cancelled == [(CONVERSATION, OTHER_TURN), (CONVERSATION, TURN)]


async def test_a_message_waits_for_the_turn_that_its_client_has_stopped(postgres: Postgres, clock: Clock) -> None:
    postgres.admissions = [BUSY, ADMITTED]
    assert (await node_of().send(USER, SEND, wait_for=OTHER_TURN)).is_new
    assert postgres.cancelled == [(CONVERSATION, OTHER_TURN)]


async def test_a_message_does_not_wait_for_another_turn_than_the_stopped_one(postgres: Postgres, clock: Clock) -> None:
    postgres.admissions = [BUSY]
    with pytest.raises(ConversationBusy):
        await node_of().send(USER, SEND, wait_for=TURN)
    assert postgres.cancelled == []


async def test_a_turn_that_does_not_end_is_given_up_after_its_lease_and_a_moment(
    postgres: Postgres, clock: Clock
) -> None:
    def pass_time() -> None:
        clock.now += 1.0

    postgres.during = pass_time
    postgres.admissions = [BUSY] * 20
    with pytest.raises(ConversationBusy):
        await node_of().send(USER, INTERRUPT)
    assert 10 <= len(postgres.asked) <= 12  # LEASE_SECONDS is 5, INTERRUPT_SECONDS are 5


async def test_a_node_that_begins_to_drain_makes_no_other_attempt(postgres: Postgres, clock: Clock) -> None:
    node = node_of()
    postgres.during = node.draining.set
    postgres.admissions = [BUSY, ADMITTED]
    with pytest.raises(Draining):
        await node.send(USER, INTERRUPT)


# Answering again.


async def test_a_question_is_answered_again_behind_one_event(postgres: Postgres) -> None:
    running = Running()
    postgres.admissions = [ADMITTED]
    admitted = await node_of(running).regenerate(USER, REGENERATE)
    assert (admitted.turn, admitted.is_new) == (turn_ref(), True)
    ((user_id, conversation_id, client_id, turn_id, created_at),) = postgres.asked
    assert (user_id, conversation_id, client_id) == (USER, CONVERSATION, "m-1")
    assert turn_id.version == 7
    assert created_at.tzinfo is not None
    ((turn, (event,)),) = running.started
    assert (turn.turn_id, event.seq, event.type) == (TURN, FIRST_SEQ, "turn.started")
    assert json.loads(event.payload) == {"message_id": "m-1"}


@pytest.mark.parametrize(("options", "cancelled"), [({}, False), ({"interrupts": True}, True)])
async def test_answering_again_interrupts_where_it_is_told_to(
    postgres: Postgres, clock: Clock, options: dict[str, Any], cancelled: bool
) -> None:
    postgres.admissions = [BUSY, ADMITTED]
    answering = node_of().regenerate(USER, REGENERATE, **options)
    if cancelled:
        assert (await answering).is_new
    else:
        with pytest.raises(ConversationBusy):
            await answering
    assert bool(postgres.cancelled) is cancelled


# Cancelling.


async def test_a_turn_that_runs_here_is_cancelled_at_once(postgres: Postgres) -> None:
    running = Running()
    here = running.turns[OTHER_TURN] = Told()
    assert await node_of(running).cancel(USER, CONVERSATION, None) == OTHER_TURN
    assert here.calls == [("cancel",)]
    assert postgres.cancelled == [(CONVERSATION, None)]


async def test_a_turn_that_runs_elsewhere_is_asked_to_stop(postgres: Postgres) -> None:
    assert await node_of().cancel(USER, CONVERSATION, OTHER_TURN) == OTHER_TURN


async def test_where_no_turn_runs_there_is_none_to_stop(postgres: Postgres) -> None:
    postgres.cancels = CancelRequest(None, None)
    assert await node_of().cancel(USER, CONVERSATION, None) is None
    with pytest.raises(NotFound, match="There is no such turn in this conversation"):
        await node_of().cancel(USER, CONVERSATION, TURN)


async def test_a_turn_in_a_conversation_that_is_not_the_users_is_not_found(postgres: Postgres) -> None:
    postgres.cancels = None
    with pytest.raises(NotFound, match="There is no such conversation") as refused:
        await node_of().cancel(USER, CONVERSATION, None)
    assert refused.value.conversation_id == CONVERSATION
    postgres.cancels = Unavailable()
    with pytest.raises(DatabaseUnavailable):
        await node_of().cancel(USER, CONVERSATION, None)


# Appending.


def appending(outcome: str) -> Callable[..., Awaitable[AppendOutcome[Any]]]:
    async def append_messages(*arguments: Any, **options: Any) -> AppendOutcome[Any]:
        return AppendOutcome(outcome, 9, [(cast(Any, None), message("a", "user"))] if outcome == "appended" else [])

    return append_messages


async def test_followers_here_hear_of_messages_that_are_appended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversations, "append_messages", appending("appended"))
    node = node_of()
    messages, seq = await node.append(USER, CONVERSATION, [UserMessage("a")])
    assert (messages, seq) == ([message("a", "user")], 9)
    assert calls_of(node.follows) == [("hear", {CONVERSATION: 9})]


@pytest.mark.parametrize(("outcome", "kind"), [("not_found", NotFound), ("conversation_busy", ConversationBusy)])
async def test_messages_that_are_not_appended_are_refused(
    monkeypatch: pytest.MonkeyPatch, outcome: str, kind: type[NotFound | ConversationBusy]
) -> None:
    monkeypatch.setattr(conversations, "append_messages", appending(outcome))
    node = node_of()
    with pytest.raises(kind) as refused:
        await node.append(USER, CONVERSATION, [UserMessage("a")])
    assert refused.value.conversation_id == CONVERSATION
    assert calls_of(node.follows) == []


# Deleting.


async def test_followers_here_look_again_when_their_conversation_is_deleted(postgres: Postgres, clock: Clock) -> None:
    postgres.deletions = ["deleted"]
    node = node_of()
    await node.delete(USER, CONVERSATION)
    assert postgres.forced == [False]
    assert calls_of(node.follows) == [("wake", CONVERSATION)]


async def test_a_conversation_that_is_not_the_users_is_not_deleted(postgres: Postgres, clock: Clock) -> None:
    postgres.deletions = ["not_found"]
    node = node_of()
    with pytest.raises(NotFound):
        await node.delete(USER, CONVERSATION)
    assert calls_of(node.follows) == []


async def test_a_turn_in_the_way_of_a_deletion_is_cancelled(postgres: Postgres, clock: Clock) -> None:
    postgres.deletions = ["conversation_busy", "deleted"]
    await node_of().delete(USER, CONVERSATION)
    assert postgres.cancelled == [(CONVERSATION, None)]
    assert postgres.forced == [False, False]


async def test_a_turn_that_does_not_end_is_deleted_all_the_same(postgres: Postgres, clock: Clock) -> None:
    def busy() -> str:
        clock.now += 0.9
        return "conversation_busy"

    postgres.deletions = [busy, busy, busy, "deleted"]
    await node_of().delete(USER, CONVERSATION)
    assert postgres.forced == [False, False, False, True]


async def test_a_deletion_whose_attempt_was_slow_is_still_forced_and_not_given_up(
    postgres: Postgres, clock: Clock
) -> None:
    def busy() -> str:
        clock.now += 10.0
        return "conversation_busy"

    postgres.deletions = [busy, "deleted"]
    await node_of().delete(USER, CONVERSATION)
    assert postgres.forced == [False, True]


# Draining, and running.


async def test_a_drain_waits_for_the_turns_and_takes_none_over(postgres: Postgres) -> None:
    running = Running()
    node = node_of(running)
    await node.drain(25.0)
    assert node.is_draining
    assert node.drained.is_set()
    assert node._leases.may_take_over is False
    assert running.waited[0] == 25.0
    assert calls_of(node._leases) == []


async def test_turns_that_outlast_a_drain_are_handed_over_also_those_that_were_on_their_way(
    postgres: Postgres,
) -> None:
    running = Running()
    node = node_of(running)
    first, late = running.turns.setdefault(TURN, Told()), Told()

    def hand_over(turns: list[Told]) -> None:
        assert not node.drained.is_set()
        assert [turn.calls for turn in turns] == [[("lose",)]]
        running.turns = {OTHER_TURN: late} if turns == [first] else {}

    cast(Leases, node._leases).on_release = hand_over
    await node.drain(0.0)
    assert calls_of(node._leases) == [("release", [first]), ("release", [late])]
    assert node.drained.is_set()


PARTS = ["run", "beat", "read_remote", "hear_cluster", "delete_expired"]  # the first is the journal's


def running_node(monkeypatch: pytest.MonkeyPatch, loops: Loops) -> Node:
    running = Running()
    node = node_of(running, journal_retention_minutes=2)
    running.journal = loops
    node._leases = cast(Any, loops)
    node.follows = cast(Any, loops)
    for name in ("hear_cluster", "delete_expired"):
        monkeypatch.setattr(module, name, getattr(loops, name))
    return node


async def test_a_node_runs_all_its_parts_until_it_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    loops = Loops()
    node = running_node(monkeypatch, loops)
    assert node.is_running
    running = asyncio.create_task(node.run())
    for _ in range(5):
        await asyncio.sleep(0)
    assert set(PARTS) <= loops.begun.keys()
    assert len(loops.begun) == 7  # two more of the leases
    assert loops.begun["delete_expired"] == {"retention_seconds": 120}
    assert node.is_running
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not node.is_running


async def test_the_node_of_a_store_takes_nothing_over_by_itself_and_deletes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loops = Loops()
    node = running_node(monkeypatch, loops)
    node._agent = None
    running = asyncio.create_task(node.run())
    for _ in range(5):
        await asyncio.sleep(0)
    assert loops.begun.keys() == {"run", "beat", "drop_lapsed", "read_remote", "hear_cluster"}
    running.cancel()
    await asyncio.wait((running,))


async def test_the_node_of_a_store_is_known_by_its_id() -> None:
    settings = Settings(node_name="a")
    assert Node(settings, cast(Database, None), None).node_id.startswith("store:a-")
    assert Node(settings, cast(Database, None), make_echo(settings)).node_id.startswith("a-")


async def test_a_node_that_is_given_addresses_writes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    loops, emails = Loops(), Loops()
    node = running_node(monkeypatch, loops)
    node._emails = cast(Any, emails)
    running = asyncio.create_task(node.run())
    for _ in range(5):
        await asyncio.sleep(0)
    assert list(emails.begun) == ["run"]
    running.cancel()
    await asyncio.wait((running,))


@pytest.mark.parametrize("name", PARTS)
async def test_a_node_one_part_of_which_has_failed_says_that_it_does_not_run(
    monkeypatch: pytest.MonkeyPatch, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    node = running_node(monkeypatch, Loops(broken=name))
    with caplog.at_level(logging.CRITICAL):
        async with asyncio.timeout(5.0):
            await node.run()
    assert not node.is_running
    assert [record.getMessage() for record in caplog.records] == ["the node has failed and must be restarted"]
