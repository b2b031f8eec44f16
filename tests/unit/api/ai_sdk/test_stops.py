"""Which turns the client of an AI SDK connection has stopped: every row of the table, and what holds in any order."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anynode.models.turns import TurnRef
from anynode.server.api.ai_sdk.stops import STOP_SECONDS, Stops
from tests.kit.examples import examples
from tests.kit.turns import CONVERSATION, USER

CHAT, OTHER_CHAT = "chat-1", "chat-2"
NOW = 1000.0
DUE = NOW + STOP_SECONDS


def turn(number: int) -> TurnRef:
    return TurnRef(USER, CONVERSATION, UUID(int=number), 7)


P, Q, ASKED = turn(1), turn(2), turn(3)


@pytest.fixture
def stops() -> Stops:
    return Stops(remembered_max=100)


@pytest.fixture
def pending(stops: Stops) -> Stops:
    """A client that has aborted the request that resumed P."""
    assert stops.abort(CHAT, P, NOW, is_resumed=True) is None
    assert stops.next_at == DUE
    return stops


def left(stops: Stops) -> list[TurnRef]:
    """What is still pending."""
    return stops.end()


# A request that sent a question is aborted.


def test_aborting_a_question_stops_its_turn_now(stops: Stops) -> None:
    assert stops.abort(CHAT, ASKED, NOW, is_resumed=False) == ASKED
    assert stops.stopped_in(CHAT) == ASKED
    assert stops.next_at is None


def test_aborting_a_question_leaves_a_pending_stop_pending(pending: Stops) -> None:
    assert pending.abort(CHAT, ASKED, NOW, is_resumed=False) == ASKED
    assert left(pending) == [P]


# A request that resumed a turn is aborted.


def test_aborting_what_was_resumed_stops_nothing_at_once(pending: Stops) -> None:
    assert pending.stopped_in(CHAT) is None
    assert left(pending) == [P]


def test_aborting_the_same_turn_again_puts_its_stop_off(pending: Stops) -> None:
    assert pending.abort(CHAT, P, NOW + 0.2, is_resumed=True) is None
    assert pending.next_at == NOW + 0.2 + STOP_SECONDS
    assert pending.due(DUE) == []
    assert left(pending) == [P]


def test_aborting_another_turn_stops_the_one_before_now(pending: Stops) -> None:
    assert pending.abort(CHAT, Q, NOW + 0.1, is_resumed=True) == P
    assert pending.stopped_in(CHAT) == P
    assert left(pending) == [Q]


def test_chats_have_pending_stops_of_their_own(pending: Stops) -> None:
    assert pending.abort(OTHER_CHAT, Q, NOW - 0.1, is_resumed=True) is None
    assert pending.next_at == DUE - 0.1
    assert pending.due(DUE - 0.1) == [Q]
    assert (pending.stopped_in(CHAT), pending.stopped_in(OTHER_CHAT)) == (None, Q)
    assert left(pending) == [P]


# The chat is resumed.


def test_a_chat_that_is_resumed_in_time_stops_nothing(pending: Stops) -> None:
    pending.resume(CHAT)
    assert pending.next_at is None
    assert (pending.due(NOW + 99), left(pending), pending.stopped_in(CHAT)) == ([], [], None)


def test_another_chat_that_is_resumed_changes_nothing(pending: Stops) -> None:
    pending.resume(OTHER_CHAT)
    assert left(pending) == [P]


def test_a_chat_may_be_resumed_while_nothing_is_pending(stops: Stops) -> None:
    stops.resume(CHAT)
    assert left(stops) == []


# A question is sent, or something newer is waited for.


def test_what_comes_next_in_a_chat_settles_its_pending_stop(pending: Stops) -> None:
    assert pending.settle(OTHER_CHAT) is None
    assert pending.settle(CHAT) == P
    assert pending.stopped_in(CHAT) == P
    assert pending.settle(CHAT) is None
    assert left(pending) == []


# Time passes, or the connection ends.


def test_a_pending_stop_is_due_after_a_quarter_of_a_second(pending: Stops) -> None:
    assert pending.due(DUE - 0.001) == []
    assert pending.due(DUE) == [P]
    assert pending.stopped_in(CHAT) == P
    assert pending.due(DUE) == []
    assert pending.next_at is None


def test_all_pending_stops_are_due_at_the_end_of_the_connection(pending: Stops) -> None:
    pending.abort(OTHER_CHAT, Q, NOW + 99, is_resumed=True)
    assert pending.end() == [P, Q]
    assert pending.end() == []


# A question is admitted that was aborted while it waited.


def test_a_question_that_was_aborted_while_it_waited_is_stopped_when_it_is_admitted(stops: Stops) -> None:
    stops.ask("r-1")
    stops.abort_asking("r-1")
    assert stops.admit("r-1", CHAT, ASKED, None) == ASKED
    assert stops.stopped_in(CHAT) == ASKED


def test_a_question_that_was_aborted_while_another_stop_is_pending_leaves_that_pending(pending: Stops) -> None:
    pending.ask("r-1")
    pending.abort_asking("r-1")
    assert pending.admit("r-1", CHAT, ASKED, None) == ASKED
    assert left(pending) == [P]


def test_a_question_that_was_not_aborted_is_answered(stops: Stops) -> None:
    stops.ask("r-1")
    stops.ask("r-2")
    stops.abort_asking("r-2")
    stops.abort_asking("r-3")
    assert stops.admit("r-1", CHAT, ASKED, None) is None
    assert stops.admit("r-3", CHAT, ASKED, None) is None
    assert stops.stopped_in(CHAT) is None


def test_a_question_waits_until_it_is_admitted_or_refused(stops: Stops) -> None:
    for request_id in ("r-1", "r-2"):
        stops.ask(request_id)
    assert stops.asking == 2
    stops.abort_asking("r-1")
    stops.end_asking("r-1")
    assert stops.asking == 1
    stops.end_asking("r-1")
    assert stops.admit("r-1", CHAT, ASKED, None) is None  # the same requestId, used again


# Turns that were stopped, and may still run.


def test_a_stopped_turn_is_forgotten_when_a_question_has_waited_for_its_end(stops: Stops) -> None:
    stops.abort(CHAT, P, NOW, is_resumed=False)
    stops.admit("r-1", OTHER_CHAT, ASKED, None)
    assert stops.stopped_in(CHAT) == P
    stops.admit("r-1", CHAT, ASKED, P)
    assert stops.stopped_in(CHAT) is None


def test_a_turn_that_was_stopped_meanwhile_is_not_forgotten(stops: Stops) -> None:
    stops.abort(CHAT, P, NOW, is_resumed=False)
    stops.abort(CHAT, Q, NOW, is_resumed=False)
    stops.admit("r-1", CHAT, ASKED, P)
    assert stops.stopped_in(CHAT) == Q


def test_a_bounded_number_of_stopped_turns_is_remembered() -> None:
    stops = Stops(remembered_max=3)
    for number in range(3):
        stops.abort(f"chat-{number}", turn(number), NOW, is_resumed=False)
    assert stops.stopped_in("chat-0") == turn(0)
    stops.abort("chat-3", turn(3), NOW, is_resumed=False)
    assert [stops.stopped_in(f"chat-{number}") for number in range(4)] == [None, None, None, turn(3)]


# In whatever order.

chats = st.sampled_from(["chat-1", "chat-2"])
seconds = st.sampled_from([0.0, 0.1, STOP_SECONDS, 1.0])
steps = st.lists(
    st.one_of(
        st.tuples(st.just("abort"), chats, st.booleans(), seconds),
        st.tuples(st.just("resume"), chats, st.none(), seconds),
        st.tuples(st.just("settle"), chats, st.none(), seconds),
        st.tuples(st.just("due"), chats, st.none(), seconds),
    ),
    max_size=15,
)


@examples(50)
@given(steps)
def test_in_whatever_order_a_turn_is_stopped_once_and_only_one_that_was_aborted(script: list[Any]) -> None:
    """Each abort is of a turn of its own, as a request shows one turn and is aborted once."""
    stops, now = Stops(remembered_max=100), NOW
    stopped: list[TurnRef] = []
    waiting: dict[str, tuple[TurnRef, float]] = {}  # by the chat: what may be stopped later, and from when on
    for number, (act, chat, is_resumed, pause) in enumerate(script, 1):
        now += pause
        before = dict(waiting)
        found: list[TurnRef | None] = []
        match act:
            case "abort":
                found = [stops.abort(chat, turn(number), now, is_resumed=is_resumed)]
                if is_resumed:
                    expected = [before[chat][0]] if chat in before else []
                    waiting[chat] = (turn(number), now + STOP_SECONDS)
                else:
                    expected = [turn(number)]
            case "resume":
                stops.resume(chat)
                expected = []
                waiting.pop(chat, None)
            case "settle":
                found = [stops.settle(chat)]
                expected = [before[chat][0]] if chat in before else []
                waiting.pop(chat, None)
            case _:
                found = [*stops.due(now)]
                expected = [ref for ref, at in before.values() if at <= now]
                waiting = {name: each for name, each in before.items() if each[1] > now}
        assert [ref for ref in found if ref is not None] == expected
        assert stops.next_at == min((at for _, at in waiting.values()), default=None)
        stopped += expected
    rest = stops.end()
    assert len(rest) <= 2  # at most one pending stop a chat
    assert rest == [ref for ref, _ in waiting.values()]
    stopped += rest
    assert len(set(stopped)) == len(stopped)


@examples(50)
@given(st.lists(st.tuples(chats, st.integers(1, 3), seconds), max_size=15))
def test_time_alone_stops_a_turn_at_most_once_for_each_abort(script: list[tuple[str, int, float]]) -> None:
    stops, now = Stops(remembered_max=100), NOW
    aborted: dict[TurnRef, int] = {}
    stopped: list[TurnRef] = []
    for chat, number, pause in script:
        now += pause
        stopped += stops.due(now)
        assert stops.next_at is None or stops.next_at > now
        aborted[turn(number)] = aborted.get(turn(number), 0) + 1
        if (at_once := stops.abort(chat, turn(number), now, is_resumed=True)) is not None:
            stopped.append(at_once)
    stopped += stops.due(now + STOP_SECONDS)
    assert stops.due(now + 99) == []
    assert stops.end() == []
    assert set(stopped) == set(aborted)
    assert all(stopped.count(ref) <= times for ref, times in aborted.items())
