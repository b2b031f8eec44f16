"""Types of HTTP requests and responses; `/openapi.json` is made from them. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, TypeAlias
from uuid import UUID

from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from anynode.server.protocol.frames import NOT_BLANK, CallOfTool, ClientId, Cursor, ErrorDetail, Message, Time, Usage

MESSAGES_AT_ONCE_MAX: Final = 2000  # twice what one export holds, so that an export can be imported
TOOL_CALLS_MAX: Final = 128
TEXT_PARTS_MAX: Final = 128

Title: TypeAlias = Annotated[str, Meta(min_length=1, max_length=200)]
# Patterns stand only in the schemas, and `decoding` checks them: with a pattern inside a union, msgspec 0.22 reads
# memory that it has freed, and the process crashes.
Content: TypeAlias = Annotated[str, Meta(min_length=1, extra_json_schema={"pattern": NOT_BLANK.pattern})]
Mark: TypeAlias = Annotated[
    str,
    Meta(
        description="A `next_before` of an earlier page; as fast far down as at the top.",
        extra_json_schema={"pattern": r"^[0-9]{1,16}\.[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"},
    ),
]
Search: TypeAlias = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=100,
        description="A part of a title; case is ignored.",
        extra_json_schema={"pattern": r"^[^\u0000]*$"},
    ),
]
ToolName: TypeAlias = Annotated[str, Meta(min_length=1, max_length=256)]
Metadata: TypeAlias = Annotated[dict[str, Any], Meta(description="Any JSON object; at most 16 KiB.")]


class Body(Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every body and query that a client sends; unknown fields are refused."""


class NoQuery(Body, frozen=True):
    """A query without parameters."""


SKIP_MAX: Final = 10_000  # what is skipped is read; a mark costs nothing


class ConversationsQuery(Body, frozen=True):
    """Which conversations to list, newest activity first: after the first `skip`, or after a mark (`before`). `search`
    keeps those whose title contains the text, of the newest 5,000 behind the mark; case is ignored."""

    limit: Annotated[int, Meta(ge=1, le=100)] = 20
    skip: Annotated[int, Meta(ge=0, le=SKIP_MAX)] = 0
    before: Mark | UnsetType = UNSET
    search: Search | UnsetType = UNSET


class MessagesQuery(Body, frozen=True):
    """Which messages to read: the newest (50, or 1,000 for an export), or the newest before one message."""

    limit: Annotated[int, Meta(ge=1, le=1000)] | UnsetType = UNSET
    before: Annotated[UUID, Meta(description="The id of a message.")] | UnsetType = UNSET
    format: Literal["openai"] | UnsetType = UNSET


class EventsQuery(Body, frozen=True):
    """Which events to read: those after a cursor; without one a snapshot comes first."""

    after: Cursor | UnsetType = UNSET


class NewConversation(Body, frozen=True):
    """A new conversation without messages. Without a title, it gets one from its first question. `client_id` is the
    client's own id of it: with one it is made once, and later requests find it as it is."""

    title: Title | None = None
    system_prompt: str | None = None
    metadata: Metadata = {}
    client_id: ClientId | None = None


class ConversationChanges(Body, frozen=True):
    """Changes to a conversation; fields that are absent stay."""

    title: Title | UnsetType | None = UNSET
    system_prompt: str | UnsetType | None = UNSET
    metadata: Metadata | UnsetType = UNSET


class NewCalledFunction(Body, frozen=True):
    """The tool of a call, and its arguments as JSON text."""

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
    """A system message; only the first message of a conversation can be one."""

    content: Content | SpokenParts


class UserMessage(PostedMessage, frozen=True, tag="user"):
    """A user's message; no agent is asked to answer it."""

    content: Content | SpokenParts


class AssistantMessage(PostedMessage, frozen=True, tag="assistant"):
    """An assistant's message. If it has calls, a tool's message follows for each of them."""

    content: str | Parts | None = None
    tool_calls: Annotated[list[NewCall], Meta(max_length=TOOL_CALLS_MAX)] | None = None


class ToolMessage(PostedMessage, frozen=True, tag="tool"):
    """The result of a call. `tool_name` is by default the name in the call."""

    tool_call_id: ClientId
    content: str | Parts
    tool_name: ToolName | None = None


AnyPostedMessage: TypeAlias = SystemMessage | UserMessage | AssistantMessage | ToolMessage


class NewMessages(Body, frozen=True):
    """Messages to append, all or none."""

    messages: Annotated[list[AnyPostedMessage], Meta(min_length=1, max_length=MESSAGES_AT_ONCE_MAX)]


class Continue(Body, frozen=True):
    """A question. `message_id` makes the request repeatable. Without `content`, the question is the last message, which
    was appended and has no answer yet. With `wait` false, the answer does not wait for the turn's end."""

    content: Content | None = None
    message_id: ClientId | None = None
    if_busy: Literal["reject", "interrupt"] = "reject"
    wait: bool = True


class Chat(Body, frozen=True):
    """A question; without `conversation_id` it begins a new conversation."""

    message: Content
    conversation_id: UUID | None = None
    message_id: ClientId | None = None
    if_busy: Literal["reject", "interrupt"] = "reject"


class Cancel(Body, frozen=True):
    """The turn to stop; by default the running one."""

    turn_id: UUID | None = None


class Regenerate(Body, frozen=True):
    """Answer the last question again; with `message_id`, only if that is the last question."""

    message_id: ClientId | None = None
    wait: bool = True


class Conversation(Struct, frozen=True):
    """A conversation. `client_id` is the client's own id of it, or null. All later events come after the
    cursor `seq`. `updated_at` is the last activity."""

    id: UUID
    client_id: str | None
    title: str | None
    system_prompt: str | None
    metadata: Annotated[Raw, Meta(extra_json_schema={"type": "object"})]
    seq: int
    created_at: Time
    updated_at: Time


class Conversations(Struct, frozen=True):
    """A page of the list of conversations; both marks are null on the last page. A page of a search may have fewer
    than `limit`, or none, and not be the last one: go on while `next_before` is not null."""

    conversations: Sequence[Conversation]
    next_skip: int | None
    next_before: str | None


class Messages(Struct, frozen=True):
    """Messages, oldest first. `next_before` leads to older ones; it is null if there are none."""

    messages: Sequence[Message]
    next_before: UUID | None


class ExportedMessage(Struct, frozen=True, omit_defaults=True):
    """A message as the chat completions API has it."""

    role: str
    content: str | None
    tool_calls: Sequence[CallOfTool] | UnsetType = UNSET
    tool_call_id: str | UnsetType = UNSET


class Export(Struct, frozen=True):
    """Messages as the chat completions API has them; the body can be appended to another conversation."""

    messages: Sequence[ExportedMessage]


class Appended(Struct, frozen=True):
    """The messages that were appended, and the seq of the last one's event."""

    messages: Sequence[Message]
    seq: int


class Answer(Struct, frozen=True):
    """The end of a turn: `response` is the answer's text, `tool_calls` all calls of the turn, `message` the answer."""

    conversation_id: UUID
    response: str
    tool_calls: Sequence[CallOfTool]
    turn_id: UUID
    message: Message
    usage: Usage | None


class ChatAnswer(Struct, frozen=True):
    """The answer to a question, with the id of its conversation."""

    conversation_id: UUID
    response: str
    tool_calls: Sequence[CallOfTool]


class StartedTurn(Struct, frozen=True):
    """A turn that was started. Its events come after the cursor `after`, which is null if they are gone already."""

    conversation_id: UUID
    turn_id: UUID
    after: int | None


class CancelledTurn(Struct, frozen=True):
    """The turn that was asked to stop; `turn_id` is null if no turn ran."""

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
    """The reason of a refusal. `details` says which parts are wrong. The ids are there if a question had been admitted
    by then: its turn goes on, and asking again with these ids gets its answer. With `rate_limited` it says
    after how many milliseconds to try again, and, where the limit that was reached has a name, which `limit` it is and
    its value, `limit_max`."""

    code: str
    message: str
    details: Sequence[WrongPart] | UnsetType = UNSET
    conversation_id: UUID | UnsetType = UNSET
    message_id: str | UnsetType = UNSET
    limit: str | UnsetType = UNSET
    limit_max: int | UnsetType = UNSET
    retry_after_ms: int | UnsetType = UNSET


class WrongPart(Struct, frozen=True):
    """One fault of a request, with its place: `messages[2].role`, or `query.limit`."""

    path: str
    message: str


class Refusal(Struct, frozen=True):
    """A request was refused."""

    error: ErrorBody
