"""The one seam: what an agent is given, and what it yields.

An agent is an async generator function ``answer(turn)``. It is cancelled (``asyncio.CancelledError`` at its
``await``) when the turn is cancelled, times out or loses its lease; it must then let go of what it holds.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar
from uuid import UUID

from msgspec import Struct


class HistoryMessage(Struct, frozen=True):
    """One message as the agent sees it; ``tool_calls`` is a JSON list, the tool fields are for role ``tool``."""

    role: str
    content: str
    tool_calls: list[dict[str, Any]] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class TextDelta(Struct, frozen=True):
    """Some more text of the answer; none at all is a sign of life of an agent that thinks."""

    text: str


class ToolCall(Struct, frozen=True):
    """The model asks for a tool; ``arguments`` is the JSON object that the model gave.

    The first event behind calls that is none, be it an empty ``TextDelta``, is heard when they are committed: an agent
    that runs tools yields one before it does.
    """

    tool_call_id: str
    tool_name: str
    arguments: Mapping[str, Any]


class ToolResult(Struct, frozen=True):
    """A tool has answered."""

    tool_call_id: str
    tool_name: str
    content: str
    is_error: bool = False


class StepEnd(Struct, frozen=True):
    """One model request of the turn is complete; what came before is not produced again after a takeover."""


class Usage(Struct, frozen=True):
    """What a model request cost, in tokens; several in a turn add up."""

    input_tokens: int
    output_tokens: int
    model: str | None = None


AgentEvent: TypeAlias = TextDelta | ToolCall | ToolResult | StepEnd | Usage


@dataclass(frozen=True, slots=True)
class Turn:
    """What an agent is asked to answer.

    ``history`` ends with the question (role ``user``) and may begin with the system prompt (role ``system``).
    ``attempt`` is 1, or more after a takeover; ``steps`` then holds the messages of the steps that were
    completed before, which follow the history: their tools are not to be run again. ``partial`` is what the step that
    was cut had said, which is shown already and not to be said again; always empty unless the agent ``can_continue``
    or ``can_resume_calls``. ``pending`` are the calls of that step that have no result yet, always none unless it
    ``can_resume_calls``: it yields them again, with the ids that they have, and runs them, before all else.
    """

    turn_id: UUID
    conversation_id: UUID
    user_id: str
    history: Sequence[HistoryMessage]
    attempt: int = 1
    steps: Sequence[HistoryMessage] = field(default=())
    partial: str = ""
    pending: Sequence[ToolCall] = field(default=())


Agent: TypeAlias = Callable[[Turn], AsyncIterator[AgentEvent]]

AnyAgent = TypeVar("AnyAgent", bound=Agent)


def continues(agent: AnyAgent) -> AnyAgent:
    """Say of an agent, as a decorator, that it goes on from ``turn.partial`` after a takeover. The step that was cut is
    otherwise started again."""
    agent.can_continue = True  # type: ignore[attr-defined]
    return agent


def can_continue(agent: Agent) -> bool:
    """Whether the agent has said that it goes on from ``turn.partial``."""
    return bool(getattr(agent, "can_continue", False))


def resumes_calls(agent: AnyAgent) -> AnyAgent:
    """Say of an agent, as a decorator, that it runs the calls in ``turn.pending`` after a takeover instead of asking
    the model again. The step that was cut is otherwise started again, and its calls get other ids."""
    agent.can_resume_calls = True  # type: ignore[attr-defined]
    return agent


def can_resume_calls(agent: Agent) -> bool:
    """Whether the agent has said that it runs the calls in ``turn.pending``."""
    return bool(getattr(agent, "can_resume_calls", False))


class AgentError(Exception):
    """Raised by an agent to end the turn as failed with a message that people can act on.

    ``retryable`` says whether sending the question again later may succeed.
    """

    def __init__(self, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.retryable = retryable
