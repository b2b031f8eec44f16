"""Makes an agent of a function `run_agent(messages) -> (response, tool_calls)`.

The function has run its tools when it returns. The agent yields their calls and results first, then the text.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Final, TypeAlias

import msgspec

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

Messages: TypeAlias = list[dict[str, Any]]
Outcome: TypeAlias = tuple[str, Sequence[Any] | None]
RunAgent: TypeAlias = (
    Callable[[Messages], Awaitable[Outcome]]
    | Callable[[Messages], AsyncGenerator[str | Outcome, None]]
    | Callable[[Messages], AsyncGenerator[str, None]]
)

CALL: Final = "a tool's name, or an object that has its `name`, and maybe `arguments`, `result` and `id`"


def from_run_agent(run_agent: RunAgent) -> Agent:
    """Make an agent of a function that gets the messages, in the form of chat completions, and returns the answer.

    An `async def` function returns `(response, tool_calls)`. An async generator function streams: it yields text, and
    may yield `(response, tool_calls)` before or after it; the response is then empty, or begins with the text so far.
    Anything else ends the turn with an AgentError that says what it must be.
    """

    async def answer(turn: Turn) -> AsyncIterator[AgentEvent]:
        answered: object = run_agent(_messages(turn))
        if isinstance(answered, AsyncGenerator):
            async with aclosing(answered):
                async for event in _stream(answered):
                    yield event
        elif inspect.isawaitable(answered):
            response, calls = _outcome(await answered)
            for event in _told(calls, set()):
                yield event
            yield TextDelta(response)
        else:
            raise AgentError("run_agent must be an `async def` function")

    return answer


def _messages(turn: Turn) -> Messages:
    return [chat_message(message) for message in (*turn.history, *turn.steps)]


def chat_message(message: HistoryMessage) -> dict[str, Any]:
    """Return a message in the form of chat completions."""
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls is not None:
        fields["tool_calls"] = message.tool_calls
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    return fields


async def _stream(pieces: AsyncGenerator[object, None]) -> AsyncIterator[AgentEvent]:
    text = ""
    ids: set[str] = set()
    async for piece in pieces:
        if not isinstance(piece, str):
            response, calls = _outcome(piece)
            for event in _told(calls, ids):
                yield event
            if response and not response.startswith(text):
                raise AgentError("the response that run_agent yields must begin with the text that it has yielded")
            piece = response[len(text) :]
        text += piece
        yield TextDelta(piece)


def _outcome(returned: object) -> tuple[str, Sequence[object]]:
    match returned:
        case (str() as response, None):
            return response, ()
        case (str() as response, list() | tuple() as calls):
            return response, calls
    raise AgentError(
        f"run_agent must give (response, tool_calls), a str and a list or None; it gave {_described(returned)}"
    )


def _described(returned: object) -> str:
    if isinstance(returned, tuple):
        return f"({', '.join(type(item).__name__ for item in returned)})"
    return f"a {type(returned).__name__}"


def _told(calls: Sequence[object], ids: set[str]) -> Iterator[AgentEvent]:
    """Yield the calls with their results. `ids` are the ids that earlier calls have; those of these calls are added."""
    for number, call in enumerate(calls):
        fields = _fields(call, number)
        function = fields.get("function")
        asked = function if isinstance(function, Mapping) else fields
        name = _first(asked, "name", "tool", "tool_name")
        if not isinstance(name, str) or not name:
            raise AgentError(f"tool_calls[{number}] must be {CALL}; it has no name")
        id = _unique(_first(fields, "id", "tool_call_id"), ids)
        yield ToolCall(id, name, _arguments(_first(asked, "arguments", "args", "parameters", "input"), number))
        yield ToolResult(id, name, _content(_first(fields, "result", "output", "content"), number))


def _fields(call: object, number: int) -> Mapping[str, Any]:
    if isinstance(call, str):
        return {"name": call}
    dump = getattr(call, "model_dump", None)  # the objects of official SDKs are Pydantic models
    if callable(dump):
        call = dump()
    if not isinstance(call, Mapping):
        raise AgentError(f"tool_calls[{number}] must be {CALL}; it is a {type(call).__name__}")
    return call


def _first(fields: Mapping[str, Any], *names: str) -> Any:
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _unique(id: object, ids: set[str]) -> str:
    """Return the id, or a new one where there is none or an earlier call has it."""
    unique = "" if id is None else str(id)
    number = len(ids)
    while not unique or unique in ids:
        number += 1
        unique = f"call_{number}"
    ids.add(unique)
    return unique


def _arguments(arguments: object, number: int) -> Mapping[str, Any]:
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments or "{}")
        except ValueError as error:
            raise AgentError(f"the arguments of tool_calls[{number}] are not JSON") from error
    if arguments is None:
        return {}
    if not isinstance(arguments, Mapping):
        raise AgentError(f"the arguments of tool_calls[{number}] must be an object, or its JSON")
    return arguments


def _content(result: object, number: int) -> str:
    if result is None:
        return ""
    if isinstance(result, str):
        return result
    try:
        return msgspec.json.encode(result).decode()
    except (TypeError, ValueError) as error:
        raise AgentError(f"the result of tool_calls[{number}] is neither text nor JSON") from error
