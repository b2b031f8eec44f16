"""The echo agent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anynode.server.agents.agent import (
    AgentError,
    AgentEvent,
    HistoryMessage,
    TextDelta,
    ToolCall,
    ToolResult,
    Turn,
    Usage,
    can_continue,
    can_resume_calls,
)
from anynode.server.agents.echo import make_echo
from anynode.server.agents.tools import make_tool
from anynode.server.settings import ScriptedCall, Settings


def ask(*contents: str) -> Turn:
    history = [HistoryMessage("user" if i % 2 == 0 else "assistant", content) for i, content in enumerate(contents)]
    return Turn(turn_id=UUID(int=1), conversation_id=UUID(int=2), user_id="ada", history=history)


async def texts(events: AsyncIterator[AgentEvent]) -> list[str]:
    return [event.text async for event in events if isinstance(event, TextDelta)]


def fast(**settings: Any) -> Settings:
    return Settings(echo_tokens_per_second=0.0, **settings)


@given(question=st.text(), before=st.integers(0, 3))
def test_the_tokens_join_to_the_number_of_messages_and_the_question(question: str, before: int) -> None:
    turn = ask(*["earlier"] * (2 * before), question)
    tokens = asyncio.run(texts(make_echo(fast())(turn)))
    assert "".join(tokens) == f"[{2 * before + 1}] {question}"
    assert all(tokens)


async def test_each_token_is_a_word_with_the_whitespace_after_it() -> None:
    assert await texts(make_echo(fast())(ask("How  are\nyou?"))) == ["[1] ", "How  ", "are\n", "you?"]


async def test_the_last_event_is_the_usage() -> None:
    events = [event async for event in make_echo(fast())(ask("one two", "three", "four"))]
    assert events[-1] == Usage(input_tokens=4, output_tokens=2, model="echo")


@pytest.mark.parametrize("count", [1, 3, 10_001])
async def test_echo_tokens_replaces_the_echo_by_numbered_words(count: int) -> None:
    assert await texts(make_echo(fast(echo_tokens=count))(ask("Hi"))) == [f"w{i} " for i in range(count)]


async def test_it_fails_after_exactly_as_many_tokens_as_asked() -> None:
    events = make_echo(fast(echo_tokens=5, echo_fail_after=2))(ask("Hi"))
    assert [await anext(events), await anext(events)] == [TextDelta("w0 "), TextDelta("w1 ")]
    with pytest.raises(AgentError, match="ECHO_FAIL_AFTER"):
        await anext(events)


class Clock:
    """A loop's clock that only a sleep, or the test, moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.slept: list[float] = []
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: self.now)
        monkeypatch.setattr(asyncio, "sleep", self._sleep)

    async def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


async def test_token_i_is_due_i_intervals_after_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    events = make_echo(Settings(echo_tokens=4, echo_tokens_per_second=10.0))(ask("Hi"))
    due = [clock.now async for event in events if isinstance(event, TextDelta)]
    monkeypatch.undo()
    assert due == pytest.approx([1000.0, 1000.1, 1000.2, 1000.3])


async def test_a_late_echo_catches_up_without_sleeping(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    events = make_echo(Settings(echo_tokens=5, echo_tokens_per_second=10.0))(ask("Hi"))
    await anext(events)
    clock.now += 0.35  # the reader took so long: three more are due, and the last in 0.05 s
    for _ in range(4):
        await anext(events)
    monkeypatch.undo()
    assert clock.slept == pytest.approx([0.05])


async def test_a_speed_of_zero_never_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    await texts(make_echo(fast(echo_tokens=100))(ask("Hi")))
    monkeypatch.undo()
    assert clock.slept == []


# Calls of tools

SCRIPT = (
    (ScriptedCall("echo", {"text": "one"}),),
    (ScriptedCall("echo", {"text": "two"}), ScriptedCall("echo", {"text": "three"})),
    (ScriptedCall("echo", {"text": "four"}),),
)


def answered(*ids: str) -> list[HistoryMessage]:
    """What steps with these calls have left, each call in a step of its own."""
    return [HistoryMessage("tool", "done", None, "echo", id) for id in ids]


def echoed(text: str, number: int) -> ToolCall:
    return ToolCall(f"call_{number}", "echo", {"text": text})


ALL = [echoed(text, number) for number, text in enumerate(("one", "two", "three", "four"), 1)]


async def tool_events(turn: Turn, **settings: Any) -> list[ToolCall | ToolResult]:
    events = [event async for event in make_echo(fast(echo_tool_calls=SCRIPT, **settings))(turn)]
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == "[1] Hi"
    return [event for event in events if isinstance(event, ToolCall | ToolResult)]


def result_of(call: ToolCall) -> ToolResult:
    return ToolResult(call.tool_call_id, "echo", call.arguments["text"])


async def test_the_calls_of_the_script_are_made_step_by_step_before_the_echo() -> None:
    one, two, three, four = ALL
    events = await tool_events(ask("Hi"))
    assert events[:4] == [one, result_of(one), two, three]
    assert set(map(str, events[4:6])) == {str(result_of(two)), str(result_of(three))}
    assert events[6:] == [four, result_of(four)]


@pytest.mark.parametrize(
    ("made", "pending", "expected"),
    [
        ([], [ALL[0]], [[1], [2, 3], [4]]),
        (["call_1"], [], [[2, 3], [4]]),
        (["call_1"], ALL[1:3], [[2, 3], [4]]),
        (["call_1", "call_3"], [ALL[1]], [[2], [4]]),
        (["call_1", "call_2"], [], [[3], [4]]),
        (["call_1", "call_2", "call_3", "call_4"], [], []),
    ],
)
async def test_after_a_takeover_pending_calls_are_made_first_and_finished_ones_not_at_all(
    made: Sequence[str], pending: Sequence[ToolCall], expected: list[list[int]]
) -> None:
    events = await tool_events(replace(ask("Hi"), attempt=2, steps=answered(*made), pending=pending))
    steps: list[list[int]] = []
    before: object = None
    for event in events:
        if isinstance(event, ToolCall):
            if not isinstance(before, ToolCall):
                steps.append([])
            steps[-1].append(ALL.index(event) + 1)
        before = event
    assert steps == expected


async def test_the_calls_go_to_the_tools_that_it_is_given() -> None:
    def echo(text: str) -> str:
        return text.upper()

    agent = make_echo(fast(echo_tool_calls=SCRIPT[:1]), [make_tool(echo)])
    events = [event async for event in agent(ask("Hi"))]
    assert ToolResult("call_1", "echo", "ONE") in events


def test_it_continues_and_resumes_calls() -> None:
    assert can_continue(make_echo(fast()))
    assert can_resume_calls(make_echo(fast()))
