"""What a takeover finds in a turn's journal: which steps stand, and what the step that was cut had said."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anynode.server.agents.agent import (
    Agent,
    AgentEvent,
    HistoryMessage,
    TextDelta,
    ToolCall,
    ToolResult,
    Turn,
    continues,
    resumes_calls,
)
from anynode.server.agents.tool_calls import tool_calls_json
from anynode.server.engine.steps import Step, history_of_steps, stands_up_to, steps_in
from anynode.server.protocol.encoding import encode

Journal = list[tuple[str, str]]


def delta(text: str) -> tuple[str, str]:
    return "turn.delta", encode({"text": text})


def call(id: str, name: str = "search", **arguments: Any) -> tuple[str, str]:
    return "turn.tool_call", encode(ToolCall(id, name, arguments))


def result(id: str, content: str = "found", *, is_error: bool = False) -> tuple[str, str]:
    return "turn.tool_result", encode(ToolResult(id, "search", content, is_error))


def restarted(text: str, epoch: int = 2) -> tuple[str, str]:
    return "turn.restarted", encode({"epoch": epoch, "text": text})


def shapes(steps: Sequence[Step]) -> list[tuple[str, list[str], list[str]]]:
    """Each step's text, the ids of its calls, and those of its results."""
    return [
        (step.text, [call.tool_call_id for call in step.calls], [result.tool_call_id for result in step.results])
        for step in steps
    ]


def test_a_journal_without_anything_has_no_step_and_no_text() -> None:
    assert steps_in([]) == ([], "", [])


def test_text_alone_is_a_step_that_was_cut() -> None:
    assert steps_in([delta("one "), delta("two")]) == ([], "one two", [])


def test_a_result_completes_a_step_with_its_call_and_the_text_before_it() -> None:
    steps, partial, _ = steps_in([delta("let me "), delta("see"), call("1", query="x"), result("1", "42")])
    assert partial == ""
    assert steps == [
        Step(["let me ", "see"], [ToolCall("1", "search", {"query": "x"})], [ToolResult("1", "search", "42")])
    ]


def test_text_after_a_result_belongs_to_the_next_step() -> None:
    steps, partial, _ = steps_in([delta("a"), call("1"), result("1"), delta("b"), delta("c")])
    assert shapes(steps) == [("a", ["1"], ["1"])]
    assert partial == "bc"


def test_a_call_after_a_result_belongs_to_the_next_step() -> None:
    steps, partial, _ = steps_in([call("1"), result("1"), call("2"), result("2"), delta("end")])
    assert shapes(steps) == [("", ["1"], ["1"]), ("", ["2"], ["2"])]
    assert partial == "end"


def test_text_between_results_that_was_taken_back_is_in_no_step() -> None:
    cut = [delta("a"), call("1"), call("2"), result("1"), delta("b")]
    steps, partial, pending = steps_in([*cut, restarted("a"), delta("c")])
    assert shapes(steps) == [("a", ["1"], ["1"])]
    assert partial == "c"
    assert pending == []
    assert steps_in([*cut, restarted("ab")])[0][0].text == "ab"


def test_calls_that_were_made_together_stay_together_in_whatever_order_they_are_answered() -> None:
    steps, partial, _ = steps_in([delta("a"), call("1"), call("2"), call("3"), result("3"), result("1"), result("2")])
    assert shapes(steps) == [("a", ["1", "2", "3"], ["3", "1", "2"])]
    assert partial == ""


def test_a_call_without_a_result_is_pending_and_the_text_before_it_is_that_of_the_step_that_was_cut() -> None:
    assert steps_in([delta("a"), call("1", query="x")]) == ([], "a", [ToolCall("1", "search", {"query": "x"})])


def test_of_two_calls_the_one_with_a_result_stands() -> None:
    steps, partial, _ = steps_in([delta("a"), call("1"), call("2"), result("2", "yes")])
    assert shapes(steps) == [("a", ["2"], ["2"])]
    assert partial == ""


def test_text_between_two_results_of_a_step_stands_with_it() -> None:
    steps, partial, _ = steps_in([delta("a"), call("1"), call("2"), result("1"), delta("b"), result("2"), delta("c")])
    assert shapes(steps) == [("ab", ["1", "2"], ["1", "2"])]
    assert partial == "c"


def test_an_error_is_a_result_too() -> None:
    steps, _, _ = steps_in([call("1"), result("1", "no such page", is_error=True)])
    assert steps[0].results == [ToolResult("1", "search", "no such page", True)]


def test_after_a_restart_from_nothing_only_what_was_said_anew_counts() -> None:
    assert steps_in([delta("old "), call("1"), restarted(""), delta("new")]) == ([], "new", [])


def test_a_restart_keeps_the_steps_that_stood() -> None:
    steps, partial, _ = steps_in([delta("a"), call("1"), result("1"), delta("cut"), restarted("a"), delta("b")])
    assert shapes(steps) == [("a", ["1"], ["1"])]
    assert partial == "b"


def test_a_restart_voids_the_call_that_was_not_answered() -> None:
    journal = [delta("a"), call("1"), call("2"), result("1"), restarted("a"), call("3"), result("3"), delta("b")]
    steps, partial, _ = steps_in(journal)
    assert shapes(steps) == [("a", ["1"], ["1"]), ("", ["3"], ["3"])]
    assert partial == "b"


def test_a_restart_of_an_agent_that_continues_keeps_its_text() -> None:
    assert steps_in([delta("one "), restarted("one "), delta("two ")]) == ([], "one two ", [])


def test_a_restart_of_an_agent_that_continues_keeps_text_behind_completed_steps() -> None:
    journal = [delta("a "), call("1"), result("1"), delta("b "), restarted("a b "), delta("c "), call("2"), result("2")]
    steps, partial, _ = steps_in(journal)
    assert shapes(steps) == [("a ", ["1"], ["1"]), ("b c ", ["2"], ["2"])]
    assert partial == ""


def test_two_restarts_in_a_row_leave_what_one_leaves() -> None:
    journal = [delta("a "), call("1"), result("1"), delta("b "), restarted("a b "), restarted("a b ", 3), delta("c")]
    steps, partial, _ = steps_in(journal)
    assert shapes(steps) == [("a ", ["1"], ["1"])]
    assert partial == "b c"


def test_a_restart_after_one_that_kept_more_forgets_it() -> None:
    # The first node's agent could continue, the next one's cannot.
    assert steps_in([delta("one "), restarted("one "), delta("two "), restarted("", 3), delta("new")]) == (
        [],
        "new",
        [],
    )


@pytest.mark.parametrize("text", ["ümläut ☕", '\U0001f600 \\ " \n', "\u2028"])
def test_any_text_comes_through(text: str) -> None:
    steps, partial, _ = steps_in([delta(text), call("1", said=text), result("1", text), restarted(text), delta(text)])
    assert shapes(steps) == [(text, ["1"], ["1"])]
    assert steps[0].calls[0].arguments == {"said": text}
    assert steps[0].results[0].content == text
    assert partial == text


# Pending calls.


def ids(pending: Sequence[ToolCall]) -> list[str]:
    return [call.tool_call_id for call in pending]


def test_an_answered_step_has_no_pending_calls_and_neither_has_the_text_after_it() -> None:
    assert steps_in([delta("a"), call("1"), result("1")])[2] == []
    assert steps_in([delta("a"), call("1"), result("1"), delta("b")])[2] == []


def test_calls_of_a_later_step_are_pending_behind_the_steps_that_stand() -> None:
    steps, partial, pending = steps_in([call("1"), result("1"), delta("b"), call("2"), call("3")])
    assert shapes(steps) == [("", ["1"], ["1"])]
    assert (partial, ids(pending)) == ("b", ["2", "3"])


def test_of_calls_made_together_those_without_a_result_are_pending_with_no_text() -> None:
    steps, partial, pending = steps_in([delta("a"), call("1"), call("2"), call("3"), result("2")])
    assert shapes(steps) == [("a", ["2"], ["2"])]
    assert (partial, ids(pending)) == ("", ["1", "3"])


@pytest.mark.parametrize(
    ("since", "pending"),
    [
        ([], ["1", "2"]),
        ([call("1"), call("2")], ["1", "2"]),
        ([call("1"), call("2"), result("2")], ["1"]),
        ([call("1"), call("2"), result("1"), result("2")], []),
        ([call("1")], ["2", "1"]),
        ([restarted("a", 3)], ["1", "2"]),
        ([call("1"), call("2"), restarted("a", 3)], ["1", "2"]),
        ([call("1"), call("2"), result("1"), restarted("a", 3)], ["2"]),
        ([call("1"), call("2"), result("1"), restarted("a", 3), call("2"), result("2"), delta("b")], []),
    ],
)
def test_pending_calls_stay_so_through_takeovers_until_they_are_answered(since: Journal, pending: list[str]) -> None:
    assert ids(steps_in([delta("a"), call("1"), call("2"), restarted("a"), *since])[2]) == pending


@pytest.mark.parametrize("since", [[delta("b")], [call("3")], [call("3"), result("3")]])
def test_calls_that_an_attempt_has_gone_on_without_are_not_pending(since: Journal) -> None:
    pending = steps_in([delta("a"), call("1"), restarted("a"), *since])[2]
    assert "1" not in ids(pending)


def test_how_far_a_turn_stands_depends_on_what_its_agent_can_do() -> None:
    def agent() -> Agent:
        async def answer(turn: Turn) -> AsyncIterator[AgentEvent]:
            yield delta_event

        return answer

    delta_event = TextDelta("")
    assert stands_up_to(agent()) == ["turn.tool_result"]
    assert stands_up_to(resumes_calls(agent())) == ["turn.tool_call", "turn.tool_result"]
    everything = {"turn.delta", "turn.tool_call", "turn.tool_result", "turn.restarted"}
    assert set(stands_up_to(continues(agent()))) == everything
    assert set(stands_up_to(continues(resumes_calls(agent())))) == everything


# Of random turns, cut anywhere and restarted as the takeover does it.


@st.composite
def turns(draw: st.DrawFn) -> Journal:
    """What an agent says in a whole turn: steps with calls, each of them answered, and a text at the end."""
    said: Journal = []
    number = 0
    for _ in range(draw(st.integers(0, 3))):
        said += [delta(text) for text in draw(st.lists(st.text(min_size=1, max_size=3), max_size=3))]
        ids = [str(number + n) for n in range(draw(st.integers(1, 3)))]
        number += len(ids)
        said += [call(id) for id in ids]
        said += [result(id) for id in draw(st.permutations(ids))]
    return said + [delta(text) for text in draw(st.lists(st.text(min_size=1, max_size=3), max_size=3))]


def text_of(journal: Journal) -> str:
    """What a client shows after these events."""
    text = ""
    for type, payload in journal:
        if type == "turn.delta":
            text += json.loads(payload)["text"]
        elif type == "turn.restarted":
            text = json.loads(payload)["text"]
    return text


def standing(journal: Journal) -> Journal:
    """What stands for an agent that cannot continue: all up to the last result."""
    ends = [number for number, (type, _) in enumerate(journal, 1) if type == "turn.tool_result"]
    return journal[: ends[-1]] if ends else []


@given(turns(), st.integers(0, 30))
def test_what_stands_and_the_partial_text_are_what_a_client_shows(turn: Journal, cut: int) -> None:
    journal = turn[:cut]
    steps, partial, _ = steps_in(journal)
    assert "".join(step.text for step in steps) + partial == text_of(journal)
    for step in steps:
        assert step.results
        assert {call.tool_call_id for call in step.calls} == {result.tool_call_id for result in step.results}


@given(turns(), st.integers(0, 30))
def test_what_stands_has_no_partial_text(turn: Journal, cut: int) -> None:
    steps, partial, _ = steps_in(standing(turn[:cut]))
    assert partial == ""
    assert sum(len(step.results) for step in steps) == sum(type == "turn.tool_result" for type, _ in turn[:cut])


@given(turns(), st.integers(0, 30), st.integers(0, 30))
def test_a_restart_that_is_read_again_leaves_the_same_steps(turn: Journal, cut: int, continues: int) -> None:
    """Taken over twice, with nothing said in between, as once; for agents that continue and for those that cannot."""
    journal = turn[:cut] if continues % 2 else standing(turn[:cut])
    once = steps_in(journal)
    again = steps_in([*turn[:cut], restarted(text_of(journal))])
    assert shapes(again[0]) == shapes(once[0])
    assert again[1] == once[1]


def standing_to_calls(journal: Journal) -> Journal:
    """What stands for an agent that resumes calls: all up to the last call or result."""
    ends = [number for number, (type, _) in enumerate(journal, 1) if type != "turn.delta"]
    return journal[: ends[-1]] if ends else []


@given(turns(), st.integers(0, 30))
def test_an_agent_that_resumes_calls_ends_as_one_that_was_not_interrupted(turn: Journal, cut: int) -> None:
    """A step that was cut between its results becomes two; all else is equal."""
    stands = standing_to_calls(turn[:cut])
    pending = steps_in(stands)[2]
    rest = turn[len(stands) :]
    again = [call(id) for id in ids(pending)]
    interrupted = [*turn[:cut], restarted(text_of(stands)), *again, *rest]
    assert text_of(interrupted) == text_of(turn)
    steps, partial, left = steps_in(interrupted)
    whole, whole_partial, _ = steps_in(turn)
    assert (partial, left) == (whole_partial, [])
    assert [text for text in (step.text for step in steps) if text] == [step.text for step in whole if step.text]
    answered = [id for _, _, results in shapes(steps) for id in results]
    assert answered == [id for _, _, results in shapes(whole) for id in results]


@given(turns(), st.integers(0, 30))
def test_an_agent_that_goes_on_behind_the_steps_that_stand_ends_as_one_that_was_not_interrupted(
    turn: Journal, cut: int
) -> None:
    cut_off = turn[:cut]
    unanswered = sum(type == "turn.tool_call" for type, _ in cut_off) - sum(
        type == "turn.tool_result" for type, _ in cut_off
    )
    stands = standing(cut_off)
    if unanswered and stands and cut_off[-1][0] == "turn.tool_result":
        return  # a step with some of its results: the model has to ask again for what is missing
    rest = turn[len(stands) :]
    interrupted = [*cut_off, restarted(text_of(stands)), *rest]
    assert text_of(interrupted) == text_of(turn)
    steps, partial, _ = steps_in(interrupted)
    whole, whole_partial, _ = steps_in(turn)
    assert partial == whole_partial
    assert [step.text for step in steps] == [step.text for step in whole]


# What the agent, and the conversation, get of them.


def test_calls_are_stored_in_the_form_of_the_chat_completions_api() -> None:
    (stored,) = tool_calls_json([ToolCall("call-1", "search", {"query": "föö", "limit": 3})])
    assert (stored["id"], stored["type"], stored["function"]["name"]) == ("call-1", "function", "search")
    assert json.loads(stored["function"]["arguments"]) == {"query": "föö", "limit": 3}


def test_steps_are_an_assistants_message_with_calls_and_one_of_a_tool_for_each_result() -> None:
    steps, _, _ = steps_in(
        [delta("a"), call("1"), call("2"), result("1", "x"), result("2", "y"), call("3"), result("3")]
    )
    messages = history_of_steps(steps)
    assert [message.role for message in messages] == ["assistant", "tool", "tool", "assistant", "tool"]
    assert messages[0] == HistoryMessage("assistant", "a", tool_calls_json(steps[0].calls))
    assert messages[1:3] == [
        HistoryMessage("tool", "x", None, "search", "1"),
        HistoryMessage("tool", "y", None, "search", "2"),
    ]
    assert [message.content for message in messages[3:]] == ["", "found"]


def test_no_steps_are_no_messages() -> None:
    assert history_of_steps([]) == []


# What cannot be read is not taken for a step, whichever field of whichever event it is.

A_CALL = ("turn.tool_call", {"tool_call_id": "1", "tool_name": "tool", "arguments": {}})
A_RESULT = ("turn.tool_result", {"tool_call_id": "1", "tool_name": "tool", "content": "found", "is_error": False})
GOOD: list[tuple[str, dict[str, Any]]] = [("turn.delta", {"text": "said "}), A_CALL, A_RESULT]


def step_with(type: str, **fields: Any) -> list[tuple[str, str]]:
    """The journal of a completed step, with other fields (None: without them) in its event of this type."""
    changed = [(event, {**payload, **(fields if event == type else {})}) for event, payload in GOOD]
    return [
        (event, json.dumps({name: value for name, value in payload.items() if value is not None}))
        for event, payload in changed
    ]


def test_a_journal_that_nobody_has_changed_is_read() -> None:
    ((step,), partial, _) = steps_in(step_with("turn.delta"))
    assert (step.text, [call.tool_call_id for call in step.calls], partial) == ("said ", ["1"], "")


@pytest.mark.parametrize(
    ("type", "field", "value"),
    [
        ("turn.tool_result", "tool_call_id", 7),
        ("turn.tool_result", "tool_call_id", None),
        ("turn.tool_result", "tool_name", 7),
        ("turn.tool_result", "content", ["found"]),
        ("turn.tool_result", "is_error", "no"),
        ("turn.tool_call", "tool_call_id", None),
        ("turn.tool_call", "arguments", None),
        ("turn.delta", "text", None),
        ("turn.tool_call", "tool_call_id", 7),
        ("turn.tool_call", "tool_name", 7),
        ("turn.tool_call", "arguments", "none"),
        ("turn.delta", "text", 7),
    ],
)
def test_a_journal_with_a_field_of_the_wrong_kind_cannot_be_read(type: str, field: str, value: Any) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011 (whatever it is, its turn fails)
        steps_in(step_with(type, **{field: value}))


@pytest.mark.parametrize("before", [[], GOOD], ids=["at once", "after another one"])
def test_a_journal_with_a_result_of_a_call_that_was_never_made_cannot_be_read(
    before: list[tuple[str, dict[str, Any]]],
) -> None:
    orphan = (A_RESULT[0], {**A_RESULT[1], "tool_call_id": "2"})
    with pytest.raises(Exception):  # noqa: B017, PT011
        steps_in([(type, json.dumps(payload)) for type, payload in [*before, orphan]])
