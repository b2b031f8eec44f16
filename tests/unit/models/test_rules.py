"""The rules of a conversation: who speaks next, how turns end, what an agent sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anynode.models.rules import (
    CANCELLED,
    COMPLETED,
    FAILED,
    SUPERSEDED,
    TERMINAL_EVENTS,
    OutOfOrder,
    Tail,
    refused_user,
    visible,
)


@dataclass(frozen=True)
class Said:
    turn_id: int | None
    role: str
    content: str = "x"
    status: str = COMPLETED


def turn(number: int, answer: str = "x", status: str = COMPLETED) -> list[Said]:
    return [Said(number, "user"), Said(number, "assistant", answer, status)]


Word = tuple[str, tuple[str, ...], str | None]  # role, ids of its calls, id of the call that it answers

SYSTEM: Word = ("system", (), None)
USER: Word = ("user", (), None)
ANSWER: Word = ("assistant", (), None)


def calling(*ids: str) -> Word:
    return ("assistant", ids, None)


def result(id: str) -> Word:
    return ("tool", (), id)


ALPHABET = (SYSTEM, USER, ANSWER, calling("a"), calling("b"), calling("a", "b"), result("a"), result("b"), result("c"))


def is_allowed(words: Sequence[Word]) -> bool:
    tail = Tail()
    try:
        for role, calls, tool_call_id in words:
            tail = tail.followed_by(role, calls=[(id, f"tool {id}") for id in calls], tool_call_id=tool_call_id)
    except OutOfOrder:
        return False
    return True


def conversations(length_max: int) -> Iterator[tuple[Word, ...]]:
    """The design's own words, as what makes conversations: a system message or none, then turns of a question, steps
    (calls, and in whatever order the results of each) and an answer."""
    steps: list[tuple[Word, ...]] = [
        (calling(*ids), *map(result, order)) for ids in (("a",), ("b",), ("a", "b")) for order in permutations(ids)
    ]

    def turns(left: int) -> Iterator[tuple[Word, ...]]:
        yield ()
        if left > 0:
            for middle in stretches(left - 2):
                for rest in turns(left - 2 - len(middle)):
                    yield (USER, *middle, ANSWER, *rest)

    def stretches(left: int) -> Iterator[tuple[Word, ...]]:
        yield ()
        if left > 0:
            for step in steps:
                for rest in stretches(left - len(step)):
                    yield (*step, *rest)

    for first in ((), (SYSTEM,)):
        for rest in turns(length_max):
            yield (*first, *rest)


def test_exactly_what_a_conversation_can_begin_with_is_allowed() -> None:
    length = 6
    begun = {words[:end] for words in conversations(length + 3) for end in range(min(len(words), length) + 1)}
    allowed: set[tuple[Word, ...]] = {()}
    longest: set[tuple[Word, ...]] = {()}
    for _ in range(length):
        longest = {(*words, word) for words in longest for word in ALPHABET if is_allowed((*words, word))}
        allowed |= longest
    assert allowed == begun
    assert len(begun) > 100


WORDS = st.sampled_from(ALPHABET)


@given(words=st.lists(WORDS, max_size=12))
def test_what_may_come_next_is_what_is_let_through_and_otherwise_told(words: list[Word]) -> None:
    tail = Tail()
    for role, calls, tool_call_id in words:
        following = partial(tail.followed_by, role, calls=[(id, id) for id in calls], tool_call_id=tool_call_id)
        if role not in tail.next_roles:
            with pytest.raises(OutOfOrder, match=" or ".join(sorted(tail.next_roles))):
                following()
            return
        if role == "tool" and tool_call_id not in tail.pending:
            with pytest.raises(OutOfOrder, match="is pending; pending: "):
                following()
            return
        tail = following()


def test_two_calls_of_a_message_have_two_ids() -> None:
    with pytest.raises(OutOfOrder, match="same id"):
        Tail("user").followed_by("assistant", calls=[("a", "x"), ("a", "y")])


def test_a_result_of_no_call_is_told_which_calls_are_pending() -> None:
    with pytest.raises(OutOfOrder, match=r"^No call c is pending; pending: a, b\.$"):
        Tail("assistant", {"a": "x", "b": "y"}).followed_by("tool", tool_call_id="c")


@pytest.mark.parametrize(
    ("last_role", "reason"),
    [
        ("user", "A user message cannot follow a user message; expected: assistant."),
        ("assistant", "A user message cannot follow an assistant message; expected: tool."),
        ("tool", "A user message cannot follow a tool message; expected: assistant or tool."),
    ],
)
def test_a_question_that_comes_too_early_is_told_which_role_is_expected(last_role: str, reason: str) -> None:
    assert refused_user(last_role) == reason


def test_a_first_message_that_is_an_answer_is_told_which_role_is_expected() -> None:
    with pytest.raises(OutOfOrder, match=r"^An assistant message cannot come first; expected: system or user\.$"):
        Tail().followed_by("assistant")


def test_every_end_has_an_event_of_its_own() -> None:
    assert set(TERMINAL_EVENTS) == {COMPLETED, CANCELLED, FAILED}
    assert sorted(TERMINAL_EVENTS.values()) == ["turn.cancelled", "turn.completed", "turn.failed"]


def test_what_was_answered_is_seen_as_it_is() -> None:
    messages = [*turn(1), *turn(2), Said(3, "user")]
    assert visible(messages) == messages


@pytest.mark.parametrize("status", [CANCELLED, FAILED])
def test_a_silent_turn_is_left_out_with_its_question(status: str) -> None:
    messages = [*turn(1), *turn(2, "", status), Said(3, "user")]
    assert visible(messages) == [*turn(1), Said(3, "user")]


@pytest.mark.parametrize("status", [CANCELLED, FAILED])
@pytest.mark.parametrize("said", ["", "let me see"])
def test_a_stopped_turn_that_ran_a_tool_is_seen_although_its_end_is_empty(said: str, status: str) -> None:
    did_something = [Said(1, "user"), Said(1, "assistant", said), Said(1, "tool"), Said(1, "assistant", "", status)]
    assert visible([*did_something, Said(2, "user")]) == [*did_something, Said(2, "user")]
    assert visible([*did_something, *turn(2, "", status), Said(3, "user")]) == [*did_something, Said(3, "user")]


def test_a_question_goes_with_the_silent_turn_that_answered_it_last() -> None:
    messages = [
        *(Said(2, "user"), Said(1, "assistant", "let me see", SUPERSEDED), Said(1, "tool", "x", SUPERSEDED)),
        *(Said(1, "assistant", "", SUPERSEDED), Said(2, "assistant", "", CANCELLED), Said(3, "user")),
    ]
    assert visible(messages) == [Said(3, "user")]


@pytest.mark.parametrize("status", [CANCELLED, FAILED])
def test_what_a_stopped_turn_said_is_seen(status: str) -> None:
    messages = [*turn(1, "so far", status), Said(2, "user")]
    assert visible(messages) == messages


def test_a_completed_answer_is_seen_even_if_it_is_empty() -> None:
    messages = [*turn(1, ""), Said(2, "user")]
    assert visible(messages) == messages


def test_messages_without_a_turn_are_not_lost_with_a_silent_one() -> None:
    imported = [Said(None, "user"), Said(None, "assistant", "", FAILED)]
    assert visible([*imported, Said(1, "user")]) == [*imported, Said(1, "user")]


def test_a_superseded_answer_is_left_out() -> None:
    messages = [Said(1, "user"), Said(1, "assistant", "old", SUPERSEDED), Said(2, "assistant", "new"), Said(3, "user")]
    assert visible(messages) == [messages[0], messages[2], messages[3]]


def test_the_history_begins_with_a_users_message() -> None:
    messages = [Said(1, "tool"), Said(1, "assistant"), *turn(2), Said(3, "user")]
    assert visible(messages) == messages[2:]


def test_a_system_message_is_not_part_of_it() -> None:
    messages = [Said(None, "system"), *turn(1)]
    assert visible(messages) == messages[1:]


def test_without_a_users_message_there_is_nothing() -> None:
    assert visible([Said(1, "assistant")]) == []
    assert visible([]) == []


TURNS = st.tuples(st.sampled_from(["", "said"]), st.sampled_from([COMPLETED, CANCELLED, FAILED]))


@given(turns=st.lists(TURNS, max_size=8), cut=st.integers(0, 16))
def test_questions_and_answers_alternate_wherever_the_history_is_cut(turns: list[tuple[str, str]], cut: int) -> None:
    messages = [message for number, (said, status) in enumerate(turns) for message in turn(number, said, status)]
    seen = visible([*messages[cut:], Said(99, "user")])
    assert seen[-1] == Said(99, "user")
    assert [message.role for message in seen] == ["user", "assistant"] * (len(seen) // 2) + ["user"]


def words_of(messages: Sequence[Said]) -> list[Word]:
    """The messages of `turn_with_tools` with the two calls that each of their steps makes."""
    words: list[Word] = []
    results = 0
    for number, message in enumerate(messages):
        is_step = number + 1 < len(messages) and messages[number + 1].role == "tool" and message.role == "assistant"
        results = results + 1 if message.role == "tool" else 0
        words.append((message.role, ("1", "2") if is_step else (), str(results) if message.role == "tool" else None))
    return words


def turn_with_tools(number: int, answer: str, status: str, steps: int) -> list[Said]:
    """Make a turn whose end comes after some steps with two tools each."""
    question, end = turn(number, answer, status)
    step = [Said(number, "assistant", ""), Said(number, "tool"), Said(number, "tool")]
    return [question, *step * steps, end]


TURNS_WITH_TOOLS = st.tuples(
    st.sampled_from(["", "said"]), st.sampled_from([COMPLETED, CANCELLED, FAILED]), st.integers(0, 2)
)


@given(turns=st.lists(TURNS_WITH_TOOLS, max_size=8), cut=st.integers(0, 40))
def test_a_turn_is_seen_as_a_whole_or_not_at_all_wherever_the_history_is_cut(
    turns: list[tuple[str, str, int]], cut: int
) -> None:
    whole = [turn_with_tools(number, *values) for number, values in enumerate(turns)]
    messages = [message for messages in whole for message in messages]
    seen = visible([*messages[cut:], Said(99, "user")])
    assert is_allowed(words_of(seen))
    for number, messages_of_turn in enumerate(whole):
        assert [message for message in seen if message.turn_id == number] in ([], messages_of_turn)


@given(turns=st.lists(TURNS_WITH_TOOLS, max_size=8))
def test_no_turn_is_left_out_that_has_said_or_done_something(turns: list[tuple[str, str, int]]) -> None:
    whole = [turn_with_tools(number, *values) for number, values in enumerate(turns)]
    left = [
        messages
        for messages, (said, status, steps) in zip(whole, turns, strict=True)
        if said or steps or status == COMPLETED
    ]
    seen = visible([message for messages in whole for message in messages])
    assert list(seen) == [message for messages in left for message in messages]
