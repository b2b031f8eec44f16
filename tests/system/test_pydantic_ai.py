"""A Pydantic AI agent as an agent: real runs of it, with models that are functions."""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any
from uuid import UUID

import pydantic_ai
import pytest
from pydantic import BaseModel
from pydantic_ai import ModelRetry, RunContext, ToolFailed, UsageLimits, exceptions
from pydantic_ai.messages import ModelMessage
from pydantic_ai.models.fallback import FallbackModel
from pydantic_ai.models.function import AgentInfo, DeltaThinkingPart, DeltaToolCall, FunctionModel
from pydantic_ai.models.test import TestModel
from pydantic_ai.tools import DeferredToolRequests

from anynode.server.agents.agent import (
    Agent,
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
from anynode.server.agents.load import check_agent
from anynode.server.agents.pydantic_ai import from_pydantic_ai
from anynode.server.agents.tool_calls import tool_calls_json
from anynode.server.engine.steps import Step
from anynode.server.errors import ConfigurationError

KEY = "key-for-tests-0123456789"
QUESTION = HistoryMessage("user", "Hi")
Delta = str | dict[int, DeltaToolCall] | dict[int, DeltaThinkingPart]


class Model:
    """A model that gives these responses one after another, and keeps what it was asked."""

    def __init__(self, *responses: Sequence[Delta | Exception]) -> None:
        self.asked: list[list[ModelMessage]] = []
        self.instructions: list[str | None] = []
        self._responses = list(responses)

    async def stream(self, messages: list[ModelMessage], info: AgentInfo) -> AsyncGenerator[Any, None]:
        self.asked.append(list(messages))
        self.instructions.append(info.instructions)
        for delta in self._responses.pop(0):
            if isinstance(delta, Exception):
                raise delta
            yield delta

    def agent(self, **options: Any) -> pydantic_ai.Agent[Any, Any]:
        """An agent that has it."""
        return pydantic_ai.Agent(FunctionModel(stream_function=self.stream, model_name="m"), **options)

    def was_asked(self, number: int = 0) -> list[list[tuple[str, ...]]]:
        """What a request has given it: for each message, its parts."""
        return [[_plain(part) for part in message.parts] for message in self.asked[number]]


def _plain(part: Any) -> tuple[str, ...]:
    match part.part_kind:
        case "tool-call":
            return "call", part.tool_call_id, part.tool_name, part.args
        case "tool-return":
            return "return", part.tool_call_id, part.tool_name, part.content
        case kind:
            return kind, part.content


def calls(*given: tuple[str, str, str]) -> dict[int, DeltaToolCall]:
    """The deltas of calls (id, tool, arguments)."""
    return {number: DeltaToolCall(name, args, tool_call_id=id) for number, (id, name, args) in enumerate(given)}


def ask(*history: HistoryMessage, **fields: Any) -> Turn:
    history = history or (QUESTION,)
    return Turn(turn_id=UUID(int=1), conversation_id=UUID(int=2), user_id="ada", history=history, **fields)


async def said_by(agent: Agent, turn: Turn | None = None) -> list[AgentEvent]:
    """What the agent says, less the signs of life and the usage."""
    events = [event async for event in agent(turn or ask())]
    return [event for event in events if event != TextDelta("") and not isinstance(event, Usage)]


async def refusal_of(agent: Agent) -> AgentError:
    with pytest.raises(AgentError) as refusal:
        await said_by(agent)
    assert KEY not in refusal.value.message
    assert refusal.value.message.isprintable()
    return refusal.value


def steps_of(events: Sequence[AgentEvent]) -> list[list[str]]:
    """The calls of each step, cut as a turn cuts them."""
    step, steps = Step(), []
    for event in events:
        match event:
            case ToolCall():
                step.add_call(event)
            case ToolResult():
                step.add_result(event)
                if step.is_complete:
                    steps.append([call.tool_call_id for call in step.calls])
                    step = Step()
            case _:
                pass
    assert step.calls == []
    return steps


def search(q: str = "") -> str:
    return f"found {q}"


# Text


async def test_text_is_streamed_as_it_comes() -> None:
    said: list[AgentEvent] = []

    async def stream(messages: list[ModelMessage], info: AgentInfo) -> AsyncGenerator[str, None]:
        yield "a "
        await is_heard.wait()
        yield "b"

    is_heard = asyncio.Event()
    async for event in from_pydantic_ai(pydantic_ai.Agent(FunctionModel(stream_function=stream)))(ask()):
        if event == TextDelta("a "):
            is_heard.set()
        said.append(event)
    assert [event for event in said if isinstance(event, TextDelta) and event.text] == [TextDelta("a "), TextDelta("b")]


async def test_what_a_run_cost_is_told_for_each_request() -> None:
    model = Model([calls(("1", "search", "{}"))], ["one two"])
    events = [event async for event in from_pydantic_ai(model.agent(tools=[search]))(ask())]
    used = [event for event in events if isinstance(event, Usage)]
    assert [usage.model for usage in used] == ["m", "m"]
    assert events.index(used[0]) < [isinstance(event, ToolResult) for event in events].index(True)
    assert events[-1] == used[1]
    (alone,) = [
        event async for event in from_pydantic_ai(Model(["one two"]).agent())(ask()) if isinstance(event, Usage)
    ]
    assert used[1] == alone
    assert alone.input_tokens > 0 < alone.output_tokens


async def test_thinking_is_a_sign_of_life() -> None:
    model = Model([{0: DeltaThinkingPart(content="hm")}, {0: DeltaThinkingPart(content="hm")}, "a"])
    events = [event async for event in from_pydantic_ai(model.agent())(ask())]
    before = events[: events.index(TextDelta("a"))]
    assert len(before) >= 2
    assert {*before} == {TextDelta("")}


class Answer(BaseModel):
    n: int


@pytest.mark.parametrize("options", [{"output_type": Answer}, {"output_type": pydantic_ai.NativeOutput(Answer)}])
async def test_output_that_is_not_text_is_told_once_as_json(options: dict[str, Any]) -> None:
    by_a_tool = options["output_type"] is Answer
    model = Model(["So: ", calls(("1", "final_result", '{"n": 3}'))] if by_a_tool else ['{"n":3}'])
    events = await said_by(from_pydantic_ai(model.agent(**options)))
    assert [event.text for event in events if isinstance(event, TextDelta)] == [
        *(["So: "] if by_a_tool else []),
        '{"n":3}',
    ]
    assert steps_of(events) == ([["1"]] if by_a_tool else [])


# Tools


async def test_calls_and_their_results_are_told() -> None:
    model = Model(["Well. ", calls(("1", "search", '{"q":"a"}'))], ["Done"])
    assert await said_by(from_pydantic_ai(model.agent(tools=[search]))) == [
        TextDelta("Well. "),
        ToolCall("1", "search", {"q": "a"}),
        ToolResult("1", "search", "found a"),
        TextDelta("Done"),
    ]


async def test_a_result_that_is_no_text_is_told_as_json() -> None:
    def look() -> dict[str, int]:
        return {"n": 1}

    model = Model([calls(("1", "look", "{}"))], ["Done"])
    assert ToolResult("1", "look", '{"n":1}') in await said_by(from_pydantic_ai(model.agent(tools=[look])))


@pytest.mark.parametrize("sequential", [False, True])
async def test_several_calls_of_a_response_are_one_step(sequential: bool) -> None:
    tool = pydantic_ai.Tool(search, sequential=sequential)
    both = calls(("1", "search", '{"q":"a"}'), ("2", "search", '{"q":"b"}'))
    model = Model([both], [both], ["Done"])
    events = await said_by(from_pydantic_ai(model.agent(tools=[tool])))
    assert steps_of(events) == [["1", "2"], ["1", "2"]]


async def test_calls_that_are_skipped_as_the_output_is_there_are_in_its_step() -> None:
    model = Model([calls(("1", "final_result", '{"n": 3}'), ("2", "search", "{}"))])
    agent = model.agent(tools=[search], output_type=Answer, end_strategy="early")
    assert steps_of(await said_by(from_pydantic_ai(agent))) == [["1", "2"]]


@pytest.mark.parametrize(("error", "says"), [(ModelRetry("not so"), "not so"), (ToolFailed("gone"), "gone")])
async def test_a_tool_that_asks_for_another_try_or_fails_has_an_error_as_its_result(
    error: Exception, says: str
) -> None:
    def fail() -> str:
        raise error

    model = Model([calls(("1", "fail", "{}"))], ["Done"])
    _, result, text = await said_by(from_pydantic_ai(model.agent(tools=[fail])))
    assert isinstance(result, ToolResult)
    assert result.is_error
    assert says in result.content
    assert text == TextDelta("Done")


async def test_arguments_that_are_no_json_are_kept_and_answered_with_an_error() -> None:
    model = Model([calls(("1", "search", '{"q":'))], ["Done"])
    call, result, _ = await said_by(from_pydantic_ai(model.agent(tools=[search])))
    assert isinstance(call, ToolCall)
    assert '{"q":' in call.arguments.values()
    assert isinstance(result, ToolResult)
    assert result.is_error


async def test_a_tools_own_exceptions_are_its_own() -> None:
    def fail() -> str:
        raise LookupError("no such thing")

    with pytest.raises(LookupError):
        await said_by(from_pydantic_ai(Model([calls(("1", "fail", "{}"))]).agent(tools=[fail])))


# History


CALLS = tool_calls_json([ToolCall("1", "search", {"q": "a"}), ToolCall("2", "search", {"q": "b"})])
STEPS = (
    HistoryMessage("assistant", "Well", CALLS),
    HistoryMessage("tool", "found b", None, "search", "2"),
    HistoryMessage("tool", "found a", None, "search", "1"),
)
REQUESTED = [("text", "Well"), ("call", "1", "search", '{"q":"a"}'), ("call", "2", "search", '{"q":"b"}')]
FOUND = [("return", "1", "search", "found a"), ("return", "2", "search", "found b")]  # in the order of the calls


async def test_the_history_is_what_the_model_is_asked_with() -> None:
    history = [HistoryMessage("system", "Be brief"), QUESTION, *STEPS, HistoryMessage("assistant", "Done"), QUESTION]
    model = Model(["a"])
    await said_by(from_pydantic_ai(model.agent()), ask(*history))
    assert model.was_asked() == [
        [("system-prompt", "Be brief"), ("user-prompt", "Hi")],
        REQUESTED,
        FOUND,
        [("text", "Done")],
        [("user-prompt", "Hi")],
    ]


async def test_the_history_of_a_turn_is_what_the_model_was_asked_with_in_it() -> None:
    """Round trip: what a turn leaves, given back, is what the run itself had."""
    both = calls(("1", "search", '{"q":"a"}'), ("2", "search", '{"q":"b"}'))
    model = Model(["Well", both], ["Done"], ["a"])
    agent = from_pydantic_ai(model.agent(tools=[search]))
    results = [event for event in await said_by(agent) if isinstance(event, ToolResult)]
    left = [HistoryMessage("tool", result.content, None, "search", result.tool_call_id) for result in results]
    await said_by(agent, ask(QUESTION, STEPS[0], *left, HistoryMessage("assistant", "Done"), QUESTION))
    assert model.was_asked(2)[:3] == model.was_asked(1)


async def test_an_answer_that_was_cancelled_before_its_first_word_is_left_out() -> None:
    history = [QUESTION, HistoryMessage("assistant", ""), HistoryMessage("user", "And now?")]
    model = Model(["a"])
    await said_by(from_pydantic_ai(model.agent()), ask(*history))
    assert model.was_asked() == [[("user-prompt", "Hi"), ("user-prompt", "And now?")]]


async def test_the_agents_own_prompts_are_in_every_turn() -> None:
    model = Model(["a"], ["b"])
    agent = from_pydantic_ai(model.agent(system_prompt="Be kind", instructions="Be clear"))
    await said_by(agent)
    await said_by(
        agent, ask(HistoryMessage("system", "Be brief"), QUESTION, HistoryMessage("assistant", "a"), QUESTION)
    )
    assert model.was_asked()[0] == [("system-prompt", "Be kind"), ("user-prompt", "Hi")]
    assert model.was_asked(1)[0][:2] == [("system-prompt", "Be kind"), ("system-prompt", "Be brief")]
    assert model.instructions == ["Be clear", "Be clear"]


@pytest.mark.parametrize("deps", ["ada", lambda turn: turn.user_id])
async def test_dependencies_are_given_or_made_of_the_turn(deps: Any) -> None:
    def who(context: RunContext[str]) -> str:
        return context.deps

    model = Model([calls(("1", "who", "{}"))], ["Done"])
    events = await said_by(from_pydantic_ai(model.agent(deps_type=str, tools=[who]), deps=deps))
    assert ToolResult("1", "who", "ada") in events


async def test_the_test_model_calls_every_tool() -> None:
    events = await said_by(from_pydantic_ai(pydantic_ai.Agent(TestModel(), tools=[search])))
    assert len(steps_of(events)) == 1
    assert isinstance(events[-1], TextDelta)


# After a takeover


async def test_completed_steps_follow_the_history() -> None:
    model = Model(["Done"])
    agent = from_pydantic_ai(model.agent(tools=[search]))
    assert await said_by(agent, ask(attempt=2, steps=STEPS)) == [TextDelta("Done")]
    assert model.was_asked() == [[("user-prompt", "Hi")], REQUESTED, FOUND]


@pytest.mark.parametrize("partial", ["", "Well"])
async def test_pending_calls_are_told_and_run_with_their_ids_before_the_model_is_asked(partial: str) -> None:
    pending = [ToolCall("8", "search", {"q": "a"}), ToolCall("9", "search", {"q": "b"})]
    model = Model(["Done"])
    agent = from_pydantic_ai(model.agent(tools=[search]))
    events = await said_by(agent, ask(attempt=2, steps=STEPS, partial=partial, pending=pending))
    assert events[:2] == pending
    assert sorted(event.content for event in events[2:4] if isinstance(event, ToolResult)) == ["found a", "found b"]
    assert events[4:] == [TextDelta("Done")]
    text = [("text", partial)] if partial else []
    called = [("call", "8", "search", '{"q":"a"}'), ("call", "9", "search", '{"q":"b"}')]
    assert model.was_asked()[3] == [*text, *called]
    assert {part[1] for part in model.was_asked()[4]} == {"8", "9"}


def test_it_resumes_calls_and_does_not_continue_text() -> None:
    agent = from_pydantic_ai(Model().agent())
    assert can_resume_calls(agent)
    assert not can_continue(agent)


# Its end


async def test_a_cancel_ends_the_run_and_its_tools() -> None:
    is_running, is_cancelled = asyncio.Event(), asyncio.Event()

    async def hang() -> None:
        try:
            is_running.set()
            await asyncio.Event().wait()
        finally:
            is_cancelled.set()

    agent = from_pydantic_ai(Model([calls(("1", "hang", "{}"))]).agent(tools=[hang]))
    answering = asyncio.create_task(said_by(agent))
    await is_running.wait()
    answering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answering
    assert is_cancelled.is_set()


async def test_an_answer_that_is_left_in_the_middle_closes_the_models_stream() -> None:
    is_closed = asyncio.Event()

    async def stream(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str]:
        try:
            yield "a"
            await asyncio.Event().wait()
        finally:
            is_closed.set()

    events = from_pydantic_ai(pydantic_ai.Agent(FunctionModel(stream_function=stream)))(ask())
    assert isinstance(events, AsyncGenerator)
    async with aclosing(events):
        await anext(events)
    assert is_closed.is_set()


def http_error(status: int, **details: Any) -> exceptions.ModelHTTPError:
    return exceptions.ModelHTTPError(status, "m", {"error": f"bad key {KEY}"}, **details)


@pytest.mark.parametrize(
    ("error", "says", "retryable"),
    [
        (http_error(401), "refuses access, check the API key (status 401)", False),
        (http_error(404), "knows no such address or model", False),
        (http_error(400, provider_error_code="bad_value"), "refuses the request (status 400, bad_value)", False),
        (http_error(400, provider_error_code=KEY), "refuses the request (status 400)", False),
        (http_error(408), "try again later (status 408)", True),
        (http_error(429), "limits requests, try again later (status 429)", True),
        (http_error(429, retry_after=1.5), "limits requests, try again in 2 s", True),
        (http_error(503), "failed or cannot be reached, try again later (status 503)", True),
        (exceptions.ModelConnectionError("m", KEY), "failed or cannot be reached, try again later", True),
        (exceptions.ModelQuotaExceededError("m", KEY), "quota is used up", False),
        (exceptions.ModelContextWindowExceededError("m", KEY), "longer than the model can take", False),
        (exceptions.UnexpectedModelBehavior("no\nsense", KEY), "cannot use what its model answers: no sense", False),
    ],
)
async def test_an_error_of_the_model_is_told_in_a_line_without_what_the_provider_said(
    error: Exception, says: str, retryable: bool
) -> None:
    refusal = await refusal_of(from_pydantic_ai(Model([error]).agent()))
    assert says in refusal.message
    assert refusal.retryable is retryable


async def test_of_models_that_have_all_failed_the_last_ones_error_is_told() -> None:
    models = [FunctionModel(stream_function=Model([http_error(status)]).stream) for status in (401, 503)]
    refusal = await refusal_of(from_pydantic_ai(pydantic_ai.Agent(FallbackModel(*models))))
    assert "status 503" in refusal.message


async def test_a_usage_limit_is_told() -> None:
    agent = Model([calls(("1", "search", "{}"))]).agent(tools=[search])

    class Limited(pydantic_ai.agent.WrapperAgent[Any, Any]):
        def run_stream_events(self, *args: Any, **options: Any) -> Any:
            return super().run_stream_events(*args, usage_limits=UsageLimits(request_limit=1), **options)

    assert (
        "come to its usage limit: The next request would"
        in (await refusal_of(from_pydantic_ai(Limited(agent)))).message
    )


async def test_a_call_that_waits_for_approval_is_refused() -> None:
    tool = pydantic_ai.Tool(search, requires_approval=True)
    model = Model([calls(("1", "search", "{}"))])
    agent = model.agent(tools=[tool], output_type=[str, DeferredToolRequests])
    assert "waits for the approval" in (await refusal_of(from_pydantic_ai(agent))).message


# How it is named


named = from_pydantic_ai(pydantic_ai.Agent(TestModel()))


def test_the_agent_can_be_named_in_AGENT() -> None:
    check_agent(f"{__name__}:named")


def test_without_pydantic_ai_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "anynode.server.agents.pydantic_ai")
    monkeypatch.setitem(sys.modules, "pydantic_ai", None)
    with pytest.raises(ConfigurationError) as refusal:
        importlib.import_module("anynode.server.agents.pydantic_ai")
    assert 'pip install --upgrade "anynode[pydantic-ai]"' in str(refusal.value)
    assert "\n" not in str(refusal.value)
