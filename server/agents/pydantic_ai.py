"""Makes an agent of a Pydantic AI `Agent` (extra `anynode[pydantic-ai]`).

Pydantic AI runs the loop of model requests and tools; the history is Anynode's, and each run gets all of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar, cast

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
    resumes_calls,
)
from anynode.server.errors import ConfigurationError
from anynode.server.protocol.encoding import encode

try:
    from pydantic_ai import exceptions
    from pydantic_ai.agent import AbstractAgent, AgentRunEvents
    from pydantic_ai.messages import (
        AgentStreamEvent,
        ModelMessage,
        ModelRequest,
        ModelRequestPart,
        ModelResponse,
        ModelResponsePart,
        PartDeltaEvent,
        PartStartEvent,
        SystemPromptPart,
        TextPart,
        TextPartDelta,
        ToolCallEvent,
        ToolCallPart,
        ToolResultEvent,
        ToolReturnPart,
        UserPromptPart,
    )
    from pydantic_ai.run import AgentRunResult, AgentRunResultEvent
    from pydantic_ai.tools import DeferredToolRequests
    from pydantic_core import to_json
except ImportError as error:
    raise ConfigurationError(
        f'Pydantic AI is missing or too old ({error}): pip install --upgrade "anynode[pydantic-ai]"'
    ) from error

AnyDeps = TypeVar("AnyDeps")

LINE_CHARACTERS_MAX: Final = 300
ERROR_CODE: Final = re.compile(r"[A-Za-z_]{1,40}")  # no key is without digits


def from_pydantic_ai(
    agent: AbstractAgent[AnyDeps, Any], *, deps: AnyDeps | Callable[[Turn], AnyDeps] | None = None
) -> Agent:
    """Make an agent that answers each turn with a run of a Pydantic AI `agent`.

    `deps` are its dependencies, or a function that makes them of the turn. Output that is not text is sent as JSON.
    After a takeover, calls that have no result yet are run with the same ids. Files that tools return are lost with the
    run, as messages hold only text.
    """

    @resumes_calls
    async def answer(turn: Turn) -> AsyncIterator[AgentEvent]:
        # None is the dependency of an agent that has none, which no type can say.
        given = cast(AnyDeps, deps(turn) if callable(deps) else deps)
        try:
            # A run that is given messages does not add the agent's own system prompts.
            prompts = await agent.system_prompt_parts(deps=given, prompt=turn.history[-1].content)
            # The context closes the run whatever ends the answer: a cancel does not leave it working.
            async with agent.run_stream_events(
                message_history=_messages(turn, prompts),
                conversation_id=str(turn.conversation_id),
                deps=given,
                infer_name=False,
            ) as events:
                run = _Run(events)
                async for event in events:
                    for heard in run.hear(event):
                        yield heard
        except (exceptions.AgentRunError, exceptions.FallbackExceptionGroup) as error:
            raise _explained(error) from error

    return answer


# What a run is given. It ends with the question, with results, or with calls that are to be run: nothing else is
# passed as a prompt.


def _messages(turn: Turn, prompts: Sequence[SystemPromptPart]) -> list[ModelMessage]:
    messages: list[ModelMessage] = [ModelRequest(parts=[*prompts])] if prompts else []
    for message in (*turn.history, *turn.steps):
        if message.role == "assistant":
            # A turn that was cancelled before its first text has an empty message, which providers refuse.
            if message.content or message.tool_calls:
                messages.append(_response(message.content, _calls(message)))
        elif messages and isinstance(last := messages[-1], ModelRequest):
            messages[-1] = ModelRequest(parts=[*last.parts, _request_part(message)])
        else:
            messages.append(ModelRequest(parts=[_request_part(message)]))
    if turn.pending:
        calls = [ToolCallPart(call.tool_name, encode(call.arguments), call.tool_call_id) for call in turn.pending]
        messages.append(_response(turn.partial, calls))
    return messages


def _response(text: str, calls: Sequence[ToolCallPart]) -> ModelResponse:
    parts: list[ModelResponsePart] = [TextPart(text)] if text else []
    return ModelResponse(parts=[*parts, *calls])


def _calls(message: HistoryMessage) -> list[ToolCallPart]:
    functions = [(call["id"], call["function"]) for call in message.tool_calls or ()]
    return [ToolCallPart(function["name"], function["arguments"], id) for id, function in functions]


def _request_part(message: HistoryMessage) -> ModelRequestPart:
    match message.role:
        case "system":
            return SystemPromptPart(message.content)
        case "tool":
            return ToolReturnPart(message.tool_name or "", message.content, message.tool_call_id or "")
        case _:
            return UserPromptPart(message.content)


@dataclass(slots=True)
class _Run:
    """A run, as far as its events have come."""

    events: AgentRunEvents[Any]
    waiting: set[str] = field(default_factory=set)  # the ids of calls that were told and have no result yet
    has_spoken: bool = False  # since the last result
    input_tokens: int = 0
    output_tokens: int = 0

    def hear(self, event: AgentStreamEvent | AgentRunResultEvent[Any]) -> Iterator[AgentEvent]:
        """Yield our events for an event of the run, or an empty text where it has none of interest."""
        match event:
            case PartStartEvent(part=TextPart(content=text)) | PartDeltaEvent(delta=TextPartDelta(content_delta=text)):
                self.has_spoken = self.has_spoken or bool(text)
                yield TextDelta(text)
            case ToolCallEvent() if event.tool_call_id not in self.waiting:
                yield from self._tell_calls()
            case ToolResultEvent(part=part):
                self.waiting.discard(part.tool_call_id)
                self.has_spoken = False
                content, _ = part.model_response_str_and_user_content()
                yield ToolResult(part.tool_call_id, part.tool_name, content, part.outcome != "success")
            case AgentRunResultEvent(result=result):
                yield from self._end(result)
            case _:
                yield TextDelta("")

    def _tell_calls(self) -> Iterator[AgentEvent]:
        """Yield all calls of the response at once.

        A sequential tool begins only when the one before has its result; its call would then count as one of the next
        step.
        """
        response = next(message for message in reversed(self.events.all_messages()) if message.kind == "response")
        for part in response.tool_calls:
            self.waiting.add(part.tool_call_id)
            yield ToolCall(part.tool_call_id, part.tool_name, part.args_as_dict())
        yield from self._tell_usage(response.model_name)

    def _end(self, result: AgentRunResult[Any]) -> Iterator[AgentEvent]:
        if isinstance(result.output, DeferredToolRequests):
            raise AgentError("the agent waits for the approval or the result of a call, which nobody gives it here")
        if not self.has_spoken and result.output is not None:  # the output is the arguments of a call
            yield TextDelta(result.output if isinstance(result.output, str) else to_json(result.output).decode())
        yield from self._tell_usage(result.response.model_name)

    def _tell_usage(self, model: str | None) -> Iterator[AgentEvent]:
        """Yield the usage since it was last told, early, as a turn that fails or is cancelled later has cost it too."""
        usage = self.events.usage
        input_tokens, output_tokens = usage.input_tokens - self.input_tokens, usage.output_tokens - self.output_tokens
        self.input_tokens, self.output_tokens = usage.input_tokens, usage.output_tokens
        if input_tokens or output_tokens:
            yield Usage(input_tokens, output_tokens, model)


# What went wrong. A provider's own words stay out of it: they may quote the key.


def _explained(error: BaseException) -> AgentError:
    match error:
        case exceptions.FallbackExceptionGroup():
            return _explained(error.exceptions[-1])
        case exceptions.ModelAPIError():
            return _refused(error)
        case exceptions.UsageLimitExceeded():
            return AgentError(f"the agent has come to its usage limit: {_line(error.message.partition('. ')[0])}")
        case exceptions.UnexpectedModelBehavior():
            return AgentError(f"the agent cannot use what its model answers: {_line(error.message)}")
        case exceptions.ConcurrencyLimitExceeded() | exceptions.RunTimedOut():
            return AgentError(
                f"the agent is too busy or too slow, try again later: {_line(str(error))}", retryable=True
            )
        case _:
            return AgentError(f"the agent's run was broken off ({type(error).__name__})")


def _refused(error: exceptions.ModelAPIError) -> AgentError:
    status = error.status_code if isinstance(error, exceptions.ModelHTTPError) else 0
    again = "try again later" if error.retry_after is None else f"try again in {math.ceil(error.retry_after)} s"
    details = [f"status {status}"] if status else []
    if ERROR_CODE.fullmatch(error.provider_error_code or ""):
        details.append(str(error.provider_error_code))
    shown = f" ({', '.join(details)})" if details else ""
    if isinstance(error, exceptions.ModelQuotaExceededError):
        return AgentError(f"the provider's quota is used up, check its billing{shown}")
    if isinstance(error, exceptions.ModelRateLimitError) or status == 429:
        return AgentError(f"the provider limits requests, {again}{shown}", retryable=True)
    if isinstance(error, exceptions.ModelAuthenticationError) or status in (401, 403):
        return AgentError(f"the provider refuses access, check the API key{shown}")
    if isinstance(error, exceptions.ModelNotFoundError) or status == 404:
        return AgentError(f"the provider knows no such address or model, check the agent's model{shown}")
    if isinstance(error, exceptions.ModelContextWindowExceededError):
        return AgentError(f"the conversation is longer than the model can take{shown}")
    if isinstance(error, exceptions.ModelRequestRejectedError) or (400 <= status < 500 and status != 408):
        return AgentError(f"the provider refuses the request{shown}")
    return AgentError(f"the provider failed or cannot be reached, {again}{shown}", retryable=True)


def _line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LINE_CHARACTERS_MAX else line[: LINE_CHARACTERS_MAX - 1] + "…"
