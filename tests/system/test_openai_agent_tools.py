"""The openai agent's loop of tools against a real HTTP server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast
from uuid import UUID

import pytest

from anynode.server.agents.agent import (
    Agent,
    AgentError,
    AgentEvent,
    HistoryMessage,
    StepEnd,
    TextDelta,
    ToolCall,
    ToolResult,
    Turn,
    Usage,
    can_continue,
    can_resume_calls,
)
from anynode.server.agents.openai import open_openai
from anynode.server.agents.tool_calls import tool_calls_json
from anynode.server.agents.tools import ToolContext, make_tool
from anynode.server.settings import Settings
from tests.kit.provider import DONE, Provider, Reply, answer, call_of, calling, delta, serve_provider, usage

QUESTION = HistoryMessage("user", "Where?")
ASKED = {"role": "user", "content": "Where?"}
run: list[tuple[str, str]] = []  # the ids and the arguments that the tool was run with


async def find(name: str, context: ToolContext) -> str:
    """Find a place."""
    run.append((context.tool_call_id, name))
    if name == "nowhere":
        raise LookupError("no such place")
    return f"{name} is found"


FIND = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "Find a place.",
        "parameters": {
            "type": "object",
            "properties": {"name": {"type": "string"}},
            "required": ["name"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(autouse=True)
def _forget() -> None:
    run.clear()


@pytest.fixture
async def provider() -> AsyncIterator[Provider]:
    async with serve_provider() as provider:
        yield provider


@pytest.fixture
async def agent(provider: Provider) -> AsyncIterator[Agent]:
    async with open_openai(settings(provider), [make_tool(find)]) as agent:
        yield agent


def settings(provider: Provider, **others: Any) -> Settings:
    return Settings(openai_base_url=provider.url, openai_api_key="key", model="gpt-test", **others)


def turn(*steps: HistoryMessage, partial: str = "", pending: Sequence[ToolCall] = ()) -> Turn:
    attempt = 2 if steps or pending else 1
    return Turn(UUID(int=1), UUID(int=2), "ada", [QUESTION], attempt, steps, partial, pending)


async def collect(agent: Agent, asked: Turn | None = None) -> list[AgentEvent]:
    """What the agent says, less the signs of life."""
    return [event async for event in agent(asked or turn()) if event != TextDelta("")]


def asked_of(provider: Provider) -> list[list[Any]]:
    """The messages of each request, less the question that they begin with."""
    for request in provider.requests:
        assert request.body["messages"][0] == ASKED
    return [request.body["messages"][1:] for request in provider.requests]


def said(content: str, *calls: ToolCall) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": tool_calls_json(calls)}


def told(content: str, id: str) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": id}


def find_call(id: str, name: str) -> ToolCall:
    return ToolCall(id, "find", {"name": name})


async def test_a_call_is_run_and_the_answer_goes_on_with_its_result(provider: Provider, agent: Agent) -> None:
    provider.replies += [
        calling(call_of("a", "find", name="Ulm"), text="Let me see. "),
        answer("It is ", "there."),
    ]
    assert await collect(agent) == [
        TextDelta("Let me see. "),
        Usage(7, 1, "fake-1"),
        find_call("a", "Ulm"),
        ToolResult("a", "find", "Ulm is found"),
        StepEnd(),
        TextDelta("It is "),
        TextDelta("there."),
        Usage(7, 2, "fake-1"),
    ]
    assert asked_of(provider) == [[], [said("Let me see. ", find_call("a", "Ulm")), told("Ulm is found", "a")]]
    assert [request.body["tools"] for request in provider.requests] == [[FIND], [FIND]]
    assert ["tool_choice" in request.body for request in provider.requests] == [False, False]


async def test_without_tools_none_are_sent_and_asking_for_one_is_an_error(provider: Provider) -> None:
    provider.replies.append(calling(call_of("a", "find", name="Ulm")))
    async with open_openai(settings(provider)) as agent:
        with pytest.raises(AgentError, match="the model asked for a tool, and this server has none"):
            await collect(agent)
    assert "tools" not in provider.requests[0].body


async def test_without_tools_the_only_request_forbids_none(provider: Provider) -> None:
    async with open_openai(settings(provider, tool_steps_max=1)) as agent:
        await collect(agent)
    assert "tool_choice" not in provider.requests[0].body


async def test_several_calls_are_told_back_in_their_order_whatever_that_of_their_results(provider: Provider) -> None:
    second_ran = asyncio.Event()

    async def first() -> str:
        await second_ran.wait()
        for _ in range(20):  # until the other's result is told
            await asyncio.sleep(0)
        return "1"

    async def second() -> str:
        second_ran.set()
        return "2"

    provider.replies.append(calling(call_of("a", "first"), call_of("b", "second")))
    async with open_openai(settings(provider), [make_tool(first), make_tool(second)]) as agent:
        events = await collect(agent)
    assert [event.tool_call_id for event in events if isinstance(event, ToolResult)] == ["b", "a"]
    calls = ToolCall("a", "first", {}), ToolCall("b", "second", {})
    assert asked_of(provider)[1] == [said("", *calls), told("1", "a"), told("2", "b")]


async def test_what_is_wrong_with_a_call_is_told_to_the_model_which_goes_on(provider: Provider, agent: Agent) -> None:
    broken = {"index": 3, "id": "d", "function": {"name": "find", "arguments": '{"name": '}}
    provider.replies.append(
        calling(call_of("a", "lose"), call_of("b", "find", name=3), call_of("c", "find", name="nowhere"), broken)
    )
    events = await collect(agent)
    results = {event.tool_call_id: event.content for event in events if isinstance(event, ToolResult)}
    assert all(event.is_error for event in events if isinstance(event, ToolResult))
    assert results["a"] == "there is no tool 'lose'; there is: find"
    assert results["b"] == "the arguments of find are not valid: Expected `str`, got `int` - at `$.name`"
    assert results["c"] == "find failed: LookupError: no such place"
    assert results["d"].startswith("the arguments must be a JSON object, and are not: ")
    assert asked_of(provider)[1][1:] == [told(results[id], id) for id in "abcd"]
    assert json.loads(asked_of(provider)[1][0]["tool_calls"][3]["function"]["arguments"]) == {}
    assert events[-2:] == [TextDelta("world."), Usage(7, 2, "fake-1")]


async def test_an_id_that_the_turn_has_had_is_replaced(provider: Provider, agent: Agent) -> None:
    provider.replies += [calling(call_of("a", "find", name="Ulm")), calling(call_of("a", "find", name="Bonn"))]
    await collect(agent)
    (first, _), (second, _) = run
    assert first == "a" != second
    assert [message["tool_call_id"] for message in asked_of(provider)[2] if message["role"] == "tool"] == [
        first,
        second,
    ]


async def test_calls_of_the_history_are_sent_as_they_are(provider: Provider, agent: Agent) -> None:
    calls = [{"id": "x", "type": "function", "function": {"name": "gone", "arguments": '{"a": 1}'}}]
    history = [
        QUESTION,
        HistoryMessage("assistant", "", calls),
        HistoryMessage("tool", "found", None, "gone", "x"),
        HistoryMessage("assistant", "There."),
        QUESTION,
    ]
    await collect(agent, Turn(UUID(int=1), UUID(int=2), "ada", history))
    assert provider.requests[0].body["messages"] == [
        ASKED,
        {"role": "assistant", "content": "", "tool_calls": calls},
        told("found", "x"),
        {"role": "assistant", "content": "There."},
        ASKED,
    ]


# How many requests


async def test_in_the_last_request_the_model_may_not_call(provider: Provider) -> None:
    provider.replies += [calling(call_of("a", "find", name="Ulm")), calling(call_of("b", "find", name="Bonn"))]
    async with open_openai(settings(provider, tool_steps_max=3), [make_tool(find)]) as agent:
        events = await collect(agent)
    assert [request.body.get("tool_choice") for request in provider.requests] == [None, None, "none"]
    assert all(request.body["tools"] == [FIND] for request in provider.requests)
    assert events[-2] == TextDelta("world.")


async def test_a_model_that_calls_all_the_same_is_an_error_and_runs_nothing(provider: Provider) -> None:
    provider.replies.append(calling(call_of("a", "find", name="Ulm"), text="But "))
    async with open_openai(settings(provider, tool_steps_max=1), [make_tool(find)]) as agent:
        events: list[AgentEvent] = []

        async def listen() -> None:
            async for event in agent(turn()):
                events.append(event)

        with pytest.raises(AgentError, match=r"asks for tools after 1 requests \(TOOL_STEPS_MAX\)"):
            await listen()
    assert TextDelta("But ") in events
    assert not any(isinstance(event, ToolCall) for event in events)
    assert run == []


async def test_requests_before_a_takeover_count(provider: Provider) -> None:
    before = [
        message
        for id in ("a", "b")
        for message in (
            HistoryMessage("assistant", "", tool_calls_json([find_call(id, "Ulm")])),
            HistoryMessage("tool", "Ulm is found", None, "find", id),
        )
    ]
    async with open_openai(settings(provider, tool_steps_max=3), [make_tool(find)]) as agent:
        await collect(agent, turn(*before))
        await collect(agent, turn(*before[:2], pending=[find_call("b", "Bonn")]))
        await collect(agent, turn(*before[:2]))
    assert [request.body.get("tool_choice") for request in provider.requests] == ["none", "none", None]


# After a takeover


def test_the_agent_resumes_calls_and_continues_where_the_settings_ask_for_it(agent: Agent) -> None:
    assert can_resume_calls(agent)
    assert not can_continue(agent)


async def test_pending_calls_are_run_with_their_ids_before_the_model_is_asked(provider: Provider, agent: Agent) -> None:
    pending = [find_call("a", "Ulm"), find_call("b", "Bonn")]
    events = await collect(agent, turn(partial="Let me see. ", pending=pending))
    assert events[:2] == pending
    assert run == [("a", "Ulm"), ("b", "Bonn")]
    expected = [said("Let me see. ", *pending), told("Ulm is found", "a"), told("Bonn is found", "b")]
    assert asked_of(provider) == [expected]
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == "Hello world."


async def test_steps_that_were_completed_come_before_the_pending_calls(provider: Provider, agent: Agent) -> None:
    steps = (
        HistoryMessage("assistant", "One. ", tool_calls_json([find_call("a", "Ulm")])),
        HistoryMessage("tool", "Ulm is found", None, "find", "a"),
    )
    await collect(agent, turn(*steps, pending=[find_call("b", "Bonn")]))
    assert run == [("b", "Bonn")]
    assert asked_of(provider) == [
        [
            said("One. ", find_call("a", "Ulm")),
            told("Ulm is found", "a"),
            said("", find_call("b", "Bonn")),
            told("Bonn is found", "b"),
        ]
    ]


async def test_pending_calls_of_tools_that_are_gone_are_errors_that_the_model_is_told(provider: Provider) -> None:
    async with open_openai(settings(provider)) as agent:
        events = await collect(agent, turn(pending=[find_call("a", "Ulm")]))
    assert ToolResult("a", "find", "there is no tool 'find'; there is: none", True) in events
    assert events[-2] == TextDelta("world.")


async def test_a_step_that_was_continued_is_one_message_with_its_calls(provider: Provider) -> None:
    provider.replies.append(calling(call_of("a", "find", name="Ulm"), text="me see."))
    async with open_openai(settings(provider, continue_partial=True), [make_tool(find)]) as agent:
        assert can_continue(agent)
        assert can_resume_calls(agent)
        await collect(agent, turn(partial="Let "))
    first, second = asked_of(provider)
    assert first == [{"role": "assistant", "content": "Let "}]
    assert second == [said("Let me see.", find_call("a", "Ulm")), told("Ulm is found", "a")]


# Cancellation


async def test_cancelling_while_a_tool_runs_cancels_it(provider: Provider) -> None:
    begun, let_go = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            let_go.set()

    provider.replies.append(calling(call_of("a", "wait")))
    async with open_openai(settings(provider), [make_tool(wait)]) as agent:
        task = asyncio.create_task(collect(agent))
        await asyncio.wait_for(begun.wait(), 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert let_go.is_set()
    assert len(provider.requests) == 1


async def test_closing_the_generator_in_a_later_step_closes_the_connection(provider: Provider, agent: Agent) -> None:
    provider.replies += [calling(call_of("a", "find", name="Ulm")), Reply((delta(content="Hm"),), then="hang")]
    events = cast(Any, agent(turn()))
    async for event in events:
        if event == TextDelta("Hm"):
            break
    assert not provider.left.is_set()
    await events.aclose()
    await asyncio.wait_for(provider.left.wait(), 10)


async def test_calls_that_say_too_much_are_an_error(provider: Provider) -> None:
    provider.replies.append(Reply((delta(tool_calls=[call_of("a", "find", name="x" * 100)]), usage(1, 1), DONE)))
    async with open_openai(settings(provider, answer_bytes_max=100), [make_tool(find)]) as agent:
        with pytest.raises(AgentError, match="ANSWER_BYTES_MAX"):
            await collect(agent)
    assert run == []
