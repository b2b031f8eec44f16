"""A function `run_agent(messages) -> (response, tool_calls)` as an agent."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any
from uuid import UUID

import pytest
from pydantic import BaseModel

from anynode.server.agents.agent import (
    Agent,
    AgentError,
    AgentEvent,
    HistoryMessage,
    TextDelta,
    ToolCall,
    ToolResult,
    Turn,
)
from anynode.server.agents.load import check_agent
from anynode.server.agents.run_agent import from_run_agent

QUESTION = HistoryMessage("user", "Hi")


def ask(*history: HistoryMessage, steps: tuple[HistoryMessage, ...] = ()) -> Turn:
    history = history or (QUESTION,)
    return Turn(turn_id=UUID(int=1), conversation_id=UUID(int=2), user_id="ada", history=history, steps=steps)


def returning(returned: Any) -> Agent:
    async def run_agent(messages: list[dict[str, Any]]) -> Any:
        return returned

    return from_run_agent(run_agent)


def yielding(*pieces: Any) -> Agent:
    async def run_agent(messages: list[dict[str, Any]]) -> AsyncGenerator[Any, None]:
        for piece in pieces:
            yield piece

    return from_run_agent(run_agent)


async def said_by(agent: Agent, turn: Turn | None = None) -> list[AgentEvent]:
    return [event async for event in agent(turn or ask())]


async def told_of(*calls: Any) -> list[ToolCall]:
    """The calls that are told of those that are returned."""
    return [event for event in await said_by(returning(("", list(calls)))) if isinstance(event, ToolCall)]


async def refusal_of(agent: Agent) -> str:
    with pytest.raises(AgentError) as refusal:
        await said_by(agent)
    assert refusal.value.message.isprintable()
    return refusal.value.message


# What it is given


async def test_it_is_given_the_messages_in_the_form_of_chat_completions_steps_included() -> None:
    given: list[Any] = []

    async def run_agent(messages: list[dict[str, Any]]) -> tuple[str, None]:
        given.extend(messages)
        return "", None

    calls = [{"id": "1", "type": "function", "function": {"name": "search", "arguments": "{}"}}]
    steps = (HistoryMessage("assistant", "Well", calls), HistoryMessage("tool", "found", None, "search", "1"))
    await said_by(from_run_agent(run_agent), ask(HistoryMessage("system", "Be brief"), QUESTION, steps=steps))
    assert given == [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Well", "tool_calls": calls},
        {"role": "tool", "content": "found", "tool_call_id": "1"},
    ]


# What it returns


async def test_calls_and_results_are_told_before_the_text() -> None:
    calls = [{"id": "1", "name": "search", "arguments": {"q": "a"}, "result": "found"}, {"id": "2", "name": "look"}]
    assert await said_by(returning(("Done", calls))) == [
        ToolCall("1", "search", {"q": "a"}),
        ToolResult("1", "search", "found"),
        ToolCall("2", "look", {}),
        ToolResult("2", "look", ""),
        TextDelta("Done"),
    ]


@pytest.mark.parametrize("calls", [None, [], ()])
async def test_no_calls_are_none_or_an_empty_list(calls: Any) -> None:
    assert await said_by(returning(("Done", calls))) == [TextDelta("Done")]


class Called(BaseModel):
    """A call as official SDKs have it."""

    id: str = "1"
    function: dict[str, str] = {"name": "search", "arguments": '{"q":"a"}'}


@pytest.mark.parametrize(
    "call",
    [
        {"id": "1", "type": "function", "function": {"name": "search", "arguments": '{"q":"a"}'}},
        {"id": "1", "function": {"name": "search", "arguments": {"q": "a"}}},
        {"tool_call_id": "1", "tool": "search", "args": {"q": "a"}},
        {"id": "1", "tool_name": "search", "parameters": '{"q":"a"}'},
        {"id": 1, "name": "search", "input": {"q": "a"}},
        Called(),
    ],
)
async def test_a_call_has_one_of_the_common_forms(call: Any) -> None:
    assert await told_of(call) == [ToolCall("1", "search", {"q": "a"})]


@pytest.mark.parametrize("call", ["search", {"name": "search", "arguments": ""}, {"name": "search", "args": None}])
async def test_a_call_without_arguments_has_none(call: Any) -> None:
    assert await told_of(call) == [ToolCall("call_1", "search", {})]


@pytest.mark.parametrize(
    ("result", "content"), [("found", "found"), ({"n": [1, None]}, '{"n":[1,null]}'), (0, "0"), (None, "")]
)
@pytest.mark.parametrize("name", ["result", "output", "content"])
async def test_a_result_that_is_no_text_is_told_as_json(name: str, result: Any, content: str) -> None:
    _, told, _ = await said_by(returning(("", [{"name": "search", name: result}])))
    assert told == ToolResult("call_1", "search", content)


async def test_ids_that_are_missing_or_doubled_are_made() -> None:
    calls = await told_of("a", {"name": "b", "id": "call_2"}, {"name": "c", "id": "call_2"}, {"name": "d", "id": ""})
    ids = [call.tool_call_id for call in calls]
    assert ids[:2] == ["call_1", "call_2"]
    assert len({*ids}) == 4
    assert "" not in ids


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        ("Done", "must give (response, tool_calls), a str and a list or None; it gave a str"),
        (None, "it gave a NoneType"),
        (("Done",), "it gave (str)"),
        ((3, []), "it gave (int, list)"),
        (("Done", "search"), "it gave (str, str)"),
        (("Done", [3]), "tool_calls[0] must be a tool's name, or an object that has its `name`"),
        (("Done", ["search", {"id": "1"}]), "tool_calls[1] must be a tool's name"),
        (("Done", [{"name": "search", "args": "q=a"}]), "the arguments of tool_calls[0] are not JSON"),
        (("Done", [{"name": "search", "args": "[1]"}]), "the arguments of tool_calls[0] must be an object"),
        (("Done", [{"name": "search", "result": object()}]), "the result of tool_calls[0] is neither text nor JSON"),
    ],
)
async def test_anything_else_is_refused_with_one_line_that_says_what_it_must_be(returned: Any, says: str) -> None:
    assert says in await refusal_of(returning(returned))


async def test_a_function_that_is_not_async_is_refused() -> None:
    def run_agent(messages: list[dict[str, Any]]) -> Any:
        return "Done", []

    assert "must be an `async def` function" in await refusal_of(from_run_agent(run_agent))


async def test_its_exceptions_are_its_own() -> None:
    async def run_agent(messages: list[dict[str, Any]]) -> Any:
        raise LookupError("no such thing")

    with pytest.raises(LookupError):
        await said_by(from_run_agent(run_agent))


# What it yields


async def test_pieces_are_told_as_they_come() -> None:
    said: list[AgentEvent] = []

    async def run_agent(messages: list[dict[str, Any]]) -> AsyncGenerator[str, None]:
        yield "a "
        assert said == [TextDelta("a ")]
        yield "b"

    async for event in from_run_agent(run_agent)(ask()):
        said.append(event)
    assert said == [TextDelta("a "), TextDelta("b")]


async def test_calls_that_are_yielded_last_are_told_and_no_text_twice() -> None:
    assert await said_by(yielding("a ", "b", ("a b c", ["search"]))) == [
        TextDelta("a "),
        TextDelta("b"),
        ToolCall("call_1", "search", {}),
        ToolResult("call_1", "search", ""),
        TextDelta(" c"),
    ]


async def test_calls_that_are_yielded_between_pieces_have_different_ids() -> None:
    events = await said_by(yielding(("", ["search"]), "a", ("", ["search"]), "b"))
    assert [event.tool_call_id for event in events if isinstance(event, ToolCall)] == ["call_1", "call_2"]
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == "ab"


@pytest.mark.parametrize(
    ("piece", "says"), [(3, "it gave a int"), (("b", None), "must begin with the text that it has yielded")]
)
async def test_another_piece_is_refused(piece: Any, says: str) -> None:
    assert says in await refusal_of(yielding("a", piece))


async def test_a_generator_is_closed_when_the_answer_is() -> None:
    closed = []

    async def run_agent(messages: list[dict[str, Any]]) -> AsyncGenerator[str, None]:
        try:
            yield "a"
            yield "never"
        finally:
            closed.append(True)

    events = from_run_agent(run_agent)(ask())
    assert isinstance(events, AsyncGenerator)
    async with aclosing(events):
        assert await anext(events) == TextDelta("a")
    assert closed == [True]


# How it is named


async def shout(suffix: str, messages: list[dict[str, Any]]) -> tuple[str, None]:
    return f"Hi{suffix}", None


loud = from_run_agent(partial(shout, "!"))


async def test_the_agent_can_be_named_in_AGENT() -> None:
    check_agent(f"{__name__}:loud")
    assert await said_by(loud) == [TextDelta("Hi!")]
