"""What HTTP requests and their answers hold, as types; `/openapi.json` is made of them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Final, Literal, TypeAlias
from uuid import UUID

from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from server.protocol import ClientId, Cursor, ErrorDetail, Message, Usage

MESSAGES_AT_ONCE_MAX: Final = 1000
TOOL_CALLS_MAX: Final = 128
TEXT_PARTS_MAX: Final = 128

Title: TypeAlias = Annotated[str, Meta(min_length=1, max_length=200)]
Printable: TypeAlias = Annotated[ClientId, Meta(extra_json_schema={"format": "printable"})]
# Not blank. Only said in the schema, and checked by `decoding`: with a pattern in a union msgspec 0.22 frees what it
# still uses, and the process dies.
Content: TypeAlias = Annotated[str, Meta(min_length=1, extra_json_schema={"pattern": r"\S"})]
ToolName: TypeAlias = Annotated[str, Meta(min_length=1, max_length=256)]
Metadata: TypeAlias = Annotated[dict[str, Any], Meta(description="Any JSON object; at most 16 KiB.")]


class Body(Struct, frozen=True, forbid_unknown_fields=True):
    """What every body, and every query, of a client is."""


class NoQuery(Body, frozen=True):
    """No parameters."""


class ConversationsQuery(Body, frozen=True):
    """Which conversations: the newest activity first, past so many (`skip`), or after a mark (`before`)."""

    limit: Annotated[int, Meta(ge=1, le=100)] = 20
    skip: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    before: Annotated[str, Meta(max_length=100, description="A `next_before`: fast, however far down.")] | None = None


class MessagesQuery(Body, frozen=True):
    """Which messages: the newest, or the newest before one."""

    limit: Annotated[int, Meta(ge=1, le=1000)] | None = None
    before: Annotated[UUID, Meta(description="The id of a message.")] | None = None
    format: Literal["openai"] | None = None


class EventsQuery(Body, frozen=True):
    """From which cursor on; without one a snapshot comes first."""

    after: Cursor | None = None


class NewConversation(Body, frozen=True):
    """A conversation without messages; one without a title gets it from its first question."""

    title: Title | None = None
    system_prompt: str | None = None
    metadata: Metadata = {}


class ConversationChanges(Body, frozen=True):
    """What to change; what is absent stays."""

    title: Title | None | UnsetType = UNSET
    system_prompt: str | None | UnsetType = UNSET
    metadata: Metadata | UnsetType = UNSET


class CalledFunction(Body, frozen=True):
    """Which function a tool call calls, with JSON in `arguments`."""

    name: ToolName
    arguments: str


class CallOfTool(Body, frozen=True):
    """A tool call, as in the chat completions API."""

    id: Printable
    function: CalledFunction
    type: Literal["function"] = "function"


class TextPart(Body, frozen=True):
    """A part of a content, as in the chat completions API; only text can be stored."""

    text: Content
    type: Literal["text"] = "text"


Parts: TypeAlias = Annotated[list[TextPart], Meta(min_length=1, max_length=TEXT_PARTS_MAX)]


class NewMessage(Body, frozen=True, tag_field="role"):
    """A message to append, in the form of the chat completions API."""


class SystemMessage(NewMessage, frozen=True, tag="system"):
    """Only the first message of a conversation can be one."""

    content: Content | Parts


class UserMessage(NewMessage, frozen=True, tag="user"):
    """A question that no agent is asked."""

    content: Content | Parts


class AssistantMessage(NewMessage, frozen=True, tag="assistant"):
    """An answer; after one with calls comes the result of each."""

    content: str | Parts | None = None
    tool_calls: Annotated[list[CallOfTool], Meta(max_length=TOOL_CALLS_MAX)] | None = None


class ToolMessage(NewMessage, frozen=True, tag="tool"):
    """The result of a call; its tool's name is that of the call where none is given."""

    tool_call_id: Printable
    content: str | Parts
    tool_name: ToolName | None = None


AnyNewMessage: TypeAlias = SystemMessage | UserMessage | AssistantMessage | ToolMessage


class NewMessages(Body, frozen=True):
    """Messages to append, all or none."""

    messages: Annotated[list[AnyNewMessage], Meta(min_length=1, max_length=MESSAGES_AT_ONCE_MAX)]


class Continue(Body, frozen=True):
    """A question; `message_id` makes it repeatable. With `wait` false the answer is not waited for."""

    content: Content
    message_id: Printable | None = None
    if_busy: Literal["reject", "interrupt"] = "reject"
    wait: bool = True


class Chat(Body, frozen=True):
    """A question, in a new conversation where none is named."""

    message: Content
    conversation_id: UUID | None = None
    message_id: Printable | None = None
    if_busy: Literal["reject", "interrupt"] = "reject"


class Cancel(Body, frozen=True):
    """Which turn to stop; by default the running one."""

    turn_id: UUID | None = None


class Regenerate(Body, frozen=True):
    """Answer the last question again; with `message_id`, only if that is the last question."""

    message_id: Printable | None = None
    wait: bool = True


class Conversation(Struct, frozen=True):
    """A conversation; `seq` is a cursor that all of its later events come after; `updated_at` is its last activity."""

    id: UUID
    title: str | None
    system_prompt: str | None
    metadata: Annotated[Raw, Meta(extra_json_schema={"type": "object"})]
    seq: int
    created_at: datetime
    updated_at: datetime


class Conversations(Struct, frozen=True):
    """A page of the list; the marks are null at its end."""

    conversations: Sequence[Conversation]
    next_skip: int | None
    next_before: str | None


class Messages(Struct, frozen=True):
    """Messages, oldest first; `next_before` is where older ones are, null where there are none."""

    messages: Sequence[Message]
    next_before: UUID | None


class ExportedMessage(Struct, frozen=True, omit_defaults=True):
    """A message as the chat completions API has it."""

    role: str
    content: str | None
    tool_calls: Sequence[CallOfTool] | UnsetType = UNSET
    tool_call_id: str | UnsetType = UNSET


class Export(Struct, frozen=True):
    """Messages as the chat completions API has them; can be appended elsewhere as they are."""

    messages: Sequence[ExportedMessage]


class Appended(Struct, frozen=True):
    """The messages as they are now, and the seq of the last one's event."""

    messages: Sequence[Message]
    seq: int


class Answer(Struct, frozen=True):
    """How a turn ended: `response` is the answer's text, `tool_calls` all calls of the turn, `message` the answer."""

    conversation_id: UUID
    response: str
    tool_calls: Sequence[CallOfTool]
    turn_id: UUID
    message: Message
    usage: Usage | None


class ChatAnswer(Struct, frozen=True):
    """The answer, and where the conversation goes on."""

    conversation_id: UUID
    response: str
    tool_calls: Sequence[CallOfTool]


class StartedTurn(Struct, frozen=True):
    """A turn that runs; `after` is the cursor that its events come after, null where they are gone already."""

    conversation_id: UUID
    turn_id: UUID
    after: int | None


class CancelledTurn(Struct, frozen=True):
    """The turn that was asked to stop; null where none ran."""

    conversation_id: UUID
    turn_id: UUID | None


class StoredTurn(Struct, frozen=True):
    """A turn, and the messages that answered in it; `usage` and `finished_at` are null while it runs."""

    conversation_id: UUID
    turn_id: UUID
    status: str
    usage: Usage | None
    error: ErrorDetail | None
    created_at: datetime
    finished_at: datetime | None
    messages: Sequence[Message]


class ErrorBody(Struct, frozen=True, omit_defaults=True):
    """Why a request was refused; `details` says what is wrong where."""

    code: str
    message: str
    details: Sequence[WrongPart] | UnsetType = UNSET


class WrongPart(Struct, frozen=True):
    """What is wrong, and where: `messages[2].role`, or `query.limit`."""

    path: str
    message: str


class Refusal(Struct, frozen=True):
    """A request was refused."""

    error: ErrorBody
