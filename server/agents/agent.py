"""What an agent is given, and what it yields.

An agent is an async generator function ``answer(turn)``. It is cancelled (``asyncio.CancelledError`` at its
``await``) when the turn is cancelled, times out or loses its lease. It must then release what it holds.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar
from uuid import UUID

from msgspec import Struct

if TYPE_CHECKING:
    from anynode.server.store.store import Store


class HistoryMessage(Struct, frozen=True):
    """One message of the history that an agent is given.

    ``role`` is ``system``, ``user``, ``assistant`` or ``tool``. ``tool_calls`` are the calls that an assistant made, in
    the form of chat completions. ``tool_name`` and ``tool_call_id`` are set for role ``tool``.
    """

    role: str
    content: str
    tool_calls: list[dict[str, Any]] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class TextDelta(Struct, frozen=True):
    """Text to append to the answer. An empty text shows that an agent which takes long is still working."""

    text: str


class ToolCall(Struct, frozen=True):
    """A call of a tool, as the model asked for it; ``arguments`` is the JSON object that the model gave.

    After its calls an agent must yield one more event (an empty ``TextDelta`` will do) before it runs them. It is
    resumed from that event only when the calls are committed, so that a takeover finds them.
    """

    tool_call_id: str
    tool_name: str
    arguments: Mapping[str, Any]


class ToolResult(Struct, frozen=True):
    """The result of a tool call; ``is_error`` says that ``content`` describes why the call failed."""

    tool_call_id: str
    tool_name: str
    content: str
    is_error: bool = False


class StepEnd(Struct, frozen=True):
    """The end of a step, one request to the model. Completed steps are not produced again after a takeover."""


class Usage(Struct, frozen=True):
    """Tokens that a request to the model used. The usages of one turn are added up."""

    input_tokens: int
    output_tokens: int
    model: str | None = None


AgentEvent: TypeAlias = TextDelta | ToolCall | ToolResult | StepEnd | Usage
"""Any event that an agent may yield."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn: the question that an agent is asked to answer, and what is known of it.

    - ``history`` ends with the question (role ``user``) and may begin with the system prompt (role ``system``). It is
      the newest ``HISTORY_MESSAGES_MAX`` messages; ``history_is_cut`` says that there are older ones.
    - ``store`` reads and writes conversations of this user and of others: ``await turn.store.get_conversation_history(
      turn.conversation_id, turn.user_id, limit=5000)`` returns more of the history. While the turn runs, its own
      conversation refuses new messages (ConversationBusy). A ``Turn`` that a test has made has no store (None).

    The other fields matter after a takeover, when another node calls the agent again for the same turn:

    - ``attempt`` counts the calls of the agent for this turn, from 1.
    - ``steps`` are the messages of the steps that were completed; they follow the history. Their tools must not be run
      again.
    - ``partial`` is the text of the step that was cut. Clients have seen it, so the agent must not yield it again. It
      is empty unless the agent is decorated with ``continues`` or ``resumes_calls``.
    - ``pending`` are the calls of the step that was cut which have no result yet. It is empty unless the agent is
      decorated with ``resumes_calls``. The agent must first yield them again, with the same ids, and run them.
    """

    turn_id: UUID
    conversation_id: UUID
    user_id: str
    history: Sequence[HistoryMessage]
    attempt: int = 1
    steps: Sequence[HistoryMessage] = field(default=())
    partial: str = ""
    pending: Sequence[ToolCall] = field(default=())
    history_is_cut: bool = False
    store: Store = field(default=None, repr=False)  # type: ignore[assignment]  # every node gives its turns one


Agent: TypeAlias = Callable[[Turn], AsyncIterator[AgentEvent]]
"""An agent: an async generator function that yields the events of the answer to a turn."""

AnyAgent = TypeVar("AnyAgent", bound=Agent)


def continues(agent: AnyAgent) -> AnyAgent:
    """Decorate an agent that continues from ``turn.partial`` after a takeover. Without it, the step that was cut is
    started again."""
    agent.can_continue = True  # type: ignore[attr-defined]
    return agent


def can_continue(agent: Agent) -> bool:
    """Return whether the agent is decorated with `continues`."""
    return bool(getattr(agent, "can_continue", False))


def resumes_calls(agent: AnyAgent) -> AnyAgent:
    """Decorate an agent that runs the calls in ``turn.pending`` after a takeover, instead of asking the model again.
    Without it, the step that was cut is started again, and its calls get other ids."""
    agent.can_resume_calls = True  # type: ignore[attr-defined]
    return agent


def can_resume_calls(agent: Agent) -> bool:
    """Return whether the agent is decorated with `resumes_calls`."""
    return bool(getattr(agent, "can_resume_calls", False))


class AgentError(Exception):
    """Raise it in an agent to end the turn as failed, with a message that people can act on.

    ``retryable`` says whether sending the question again later may succeed.
    """

    def __init__(self, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.retryable = retryable
