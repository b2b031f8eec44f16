"""What HTTP requests and their answers hold, as types; `/openapi.json` is made of them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, TypeAlias
from uuid import UUID

from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from anynode.server.protocol.frames import NOT_BLANK, CallOfTool, ClientId, Cursor, ErrorDetail, Message, Time, Usage

MESSAGES_AT_ONCE_MAX: Final = 2000  # more than an export has
TOOL_CALLS_MAX: Final = 128
TEXT_PARTS_MAX: Final = 128

Title: TypeAlias = Annotated[str, Meta(min_length=1, max_length=200)]
# Patterns are only said in the schemas, and checked elsewhere: with one in a union msgspec 0.22 frees what it still
# uses, and the process dies.
Content: TypeAlias = Annotated[str, Meta(min_length=1, extra_json_schema={"pattern": NOT_BLANK.pattern})]
Mark: TypeAlias = Annotated[
    str,
    Meta(
        description="A `next_before`: fast, however far down.",
        extra_json_schema={"pattern": r"^[0-9]{1,16}\.[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"},
    ),
]
Search: TypeAlias = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=100,
        description="A part of a title, in whatever case.",
        extra_json_schema={"pattern": r"^[^\u0000]*$"},
    ),
]
ToolName: TypeAlias = Annotated[str, Meta(min_length=1, max_length=256)]
Metadata: TypeAlias = Annotated[dict[str, Any], Meta(description="Any JSON object; at most 16 KiB.")]


class Body(Struct, frozen=True, forbid_unknown_fields=True):
    """What every body, and every query, of a client is."""


class NoQuery(Body, frozen=True):
    """No parameters."""


class ConversationsQuery(Body, frozen=True):
    """Which conversations: the newest activity first, past so many (`skip`), or after a mark (`before`); with `search`
    those whose title contains it, in whatever case."""

    limit: Annotated[int, Meta(ge=1, le=100)] = 20
    skip: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    before: Mark | UnsetType = UNSET
    search: Search | UnsetType = UNSET


class MessagesQuery(Body, frozen=True):
    """Which messages: the newest (50 of them, 1,000 for an export), or the newest before one."""

    limit: Annotated[int, Meta(ge=1, le=1000)] | UnsetType = UNSET
    before: Annotated[UUID, Meta(description="The id of a message.")] | UnsetType = UNSET
    format: Literal["openai"] | UnsetType = UNSET


class EventsQuery(Body, frozen=True):
    """From which cursor on; without one a snapshot comes first."""

    after: Cursor | UnsetType = UNSET


class NewConversation(Body, frozen=True):
    """A conversation without messages; one without a title gets it from its first question."""

    title: Title | None = None
    system_prompt: str | None = None
    metadata: Metadata = {}


class ConversationChanges(Body, frozen=True):
    """What to change; what is absent stays."""

    title: Title | UnsetType | None = UNSET
    system_prompt: str | UnsetType | None = UNSET
    metadata: Metadata | UnsetType = UNSET


class NewCalledFunction(Body, frozen=True):
    """Which tool a call calls, with its arguments as JSON text."""

    name: ToolName
    arguments: str


class NewCall(Body, frozen=True):
    """A call, as in the chat completions API."""

    id: ClientId
    function: NewCalledFunction
    type: Literal["function"] = "function"


class TextPart(Body, frozen=True):
    """A part of a content, as in the chat completions API; only text can be stored."""

    text: str
    type: Literal["text"] = "text"


Parts: TypeAlias = Annotated[list[TextPart], Meta(min_length=1, max_length=TEXT_PARTS_MAX)]
SpokenParts: TypeAlias = Annotated[  # not all of them blank
    list[TextPart],
    Meta(
        min_length=1,
        max_length=TEXT_PARTS_MAX,
        extra_json_schema={"contains": {"properties": {"text": {"pattern": NOT_BLANK.pattern}}}},
    ),
]


class PostedMessage(Body, frozen=True, tag_field="role"):
    """A message to append, in the form of the chat completions API."""


class SystemMessage(PostedMessage, frozen=True, tag="system"):
    """Only the first message of a conversation can be one."""

    content: Content | SpokenParts


class UserMessage(PostedMessage, frozen=True, tag="user"):
    """A question that no agent is asked."""

    content: Content | SpokenParts


class AssistantMessage(PostedMessage, frozen=True, tag="assistant"):
    """An answer; after one with calls comes the result of each."""

    content: str | Parts | None = None
    tool_calls: Annotated[list[NewCall], Meta(max_length=TOOL_CALLS_MAX)] | None = None


class ToolMessage(PostedMessage, frozen=True, tag="tool"):
    """The result of a call; its tool's name is that of the call where none is given."""

    tool_call_id: ClientId
    content: str | Parts
    tool_name: ToolName | None = None


AnyPostedMessage: TypeAlias = SystemMessage | UserMessage | AssistantMessage | ToolMessage


class NewMessages(Body, frozen=True):
    """Messages to append, all or none."""

    messages: Annotated[list[AnyPostedMessage], Meta(min_length=1, max_length=MESSAGES_AT_ONCE_MAX)]


class Continue(Body, frozen=True):
    """A question; `message_id` makes it repeatable. With `wait` false the answer is not waited for."""

    content: Content
    message_id: ClientId | None = None
    if_busy: Literal["reject", "interrupt"] = "reject"
    wait: bool = True


class Chat(Body, frozen=True):
    """A question, in a new conversation where none is named."""

    message: Content
    conversation_id: UUID | None = None
    message_id: ClientId | None = None
    if_busy: Literal["reject", "interrupt"] = "reject"


class Cancel(Body, frozen=True):
    """Which turn to stop; by default the running one."""

    turn_id: UUID | None = None


class Regenerate(Body, frozen=True):
    """Answer the last question again; with `message_id`, only if that is the last question."""

    message_id: ClientId | None = None
    wait: bool = True


class Conversation(Struct, frozen=True):
    """A conversation; `client_id` is the id that an outside client has given it (null: none), `seq` a cursor that all
    of its later events come after; `updated_at` is its last activity."""

    id: UUID
    client_id: str | None
    title: str | None
    system_prompt: str | None
    metadata: Annotated[Raw, Meta(extra_json_schema={"type": "object"})]
    seq: int
    created_at: Time
    updated_at: Time


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
    status: Annotated[str, Meta(extra_json_schema={"enum": ["running", "completed", "cancelled", "failed"]})]
    usage: Usage | None
    error: ErrorDetail | None
    created_at: Time
    finished_at: Time | None
    messages: Sequence[Message]


class ErrorBody(Struct, frozen=True, omit_defaults=True):
    """Why a request was refused; `details` says what is wrong where. Where a question had been admitted by then, it and
    its turn go on: its ids are told, to ask again with."""

    code: str
    message: str
    details: Sequence[WrongPart] | UnsetType = UNSET
    conversation_id: UUID | UnsetType = UNSET
    message_id: str | UnsetType = UNSET


class WrongPart(Struct, frozen=True):
    """What is wrong, and where: `messages[2].role`, or `query.limit`."""

    path: str
    message: str


class Refusal(Struct, frozen=True):
    """A request was refused."""

    error: ErrorBody
