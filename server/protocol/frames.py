"""The frames of the wire `anynode.v1` as types, and strict decoding of those that clients send. No I/O."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from typing import Annotated, Any, Literal, TypeAlias, TypeGuard
from uuid import UUID

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from anynode.server.errors import InvalidFrame
from anynode.server.protocol.strict_json import strict_json

SUBPROTOCOL = "anynode.v1"
SEQ_MAX = 2**63 - 1
LONG_CHARACTERS_MIN = 16_384  # of a frame that is checked, or whose request_id is found, in a quicker way first
ID_CHARACTERS_MAX = 128  # printable characters of an id that a client chose
# A character that is no space in Python, in JavaScript, or in a JSON schema.
NOT_BLANK = re.compile(r"[^\s\u001c-\u001f\u0085\ufeff]")

# `decode_frame` and `decoding` check that an id is printable.
ClientId: TypeAlias = Annotated[
    str, Meta(min_length=1, max_length=ID_CHARACTERS_MAX, extra_json_schema={"format": "printable"})
]
Role: TypeAlias = Annotated[str, Meta(extra_json_schema={"enum": ["system", "user", "assistant", "tool"]})]
MessageStatus: TypeAlias = Annotated[
    str, Meta(extra_json_schema={"enum": ["completed", "cancelled", "failed", "superseded"]})
]
Time: TypeAlias = Annotated[datetime, Meta(tz=True)]
Cursor: TypeAlias = Annotated[int, Meta(ge=0, le=SEQ_MAX)]


class ClientFrame(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    """Base of every frame that a client sends; unknown fields are refused."""


class Auth(ClientFrame, frozen=True, tag="auth"):
    """Authenticate the connection, or renew it with a newer token of the same user."""

    token: str


class MessageSend(ClientFrame, frozen=True, tag="message.send"):
    """Admit a turn and follow its conversation; without `conversation_id`, begin a new one."""

    message_id: ClientId
    content: str
    conversation_id: UUID | None = None
    if_busy: Literal["reject", "interrupt"] = "reject"
    request_id: ClientId | None = None


class ConversationFollow(ClientFrame, frozen=True, tag="conversation.follow"):
    """Catch up from the cursor `after`, or from a snapshot, then follow live."""

    conversation_id: UUID
    after: Cursor | None = None
    request_id: ClientId | None = None


class ConversationUnfollow(ClientFrame, frozen=True, tag="conversation.unfollow"):
    """Stop following a conversation."""

    conversation_id: UUID
    request_id: ClientId | None = None


class TurnCancel(ClientFrame, frozen=True, tag="turn.cancel"):
    """Stop a turn, by default the running one, and keep what was said."""

    conversation_id: UUID
    turn_id: UUID | None = None
    request_id: ClientId | None = None


class TurnRegenerate(ClientFrame, frozen=True, tag="turn.regenerate"):
    """Answer the last question again; with `message_id`, only if that is the last question."""

    conversation_id: UUID
    message_id: ClientId | None = None
    request_id: ClientId | None = None


class Ping(ClientFrame, frozen=True, tag="ping"):
    """Ask for a `pong`."""

    request_id: ClientId | None = None


AnyClientFrame: TypeAlias = (
    Auth | MessageSend | ConversationFollow | ConversationUnfollow | TurnCancel | TurnRegenerate | Ping
)


def decode_frame(text: str) -> AnyClientFrame:
    """Decode one text frame. Raises InvalidFrame for anything else."""
    if len(text) > LONG_CHARACTERS_MIN:
        _check_fit(text)
    value = strict_json(text, "the frame")
    if not isinstance(value, dict):
        raise InvalidFrame("a frame is a JSON object")
    try:
        frame: AnyClientFrame = msgspec.convert(value, AnyClientFrame)
    except msgspec.ValidationError as error:
        raise InvalidFrame(str(error)) from None
    except RecursionError:
        raise InvalidFrame("the frame is nested too deeply") from None
    for name in ("message_id", "request_id"):
        identifier = getattr(frame, name, None)
        if identifier is not None and not is_client_id(identifier):
            raise InvalidFrame(f"{name} has unprintable characters")
    return frame


def _check_fit(text: str) -> None:
    """Check that a long text is a frame, before strict decoding makes all of its values: many small ones take a hundred
    times as long as one long content. Raises InvalidFrame."""
    try:
        msgspec.json.decode(text, type=AnyClientFrame)
    except msgspec.ValidationError as error:
        raise InvalidFrame(str(error)) from None
    except RecursionError:
        raise InvalidFrame("the frame is nested too deeply") from None
    except ValueError as error:
        raise InvalidFrame(f"the frame is not JSON: {error}") from None


def request_id_of(text: str, name: str = "request_id") -> str | None:
    """Return the `request_id` of a refused frame, if it has one, so that its sender knows which frame it was."""
    try:
        if len(text) > LONG_CHARACTERS_MIN:  # it must not cost the time that was refused to it
            request_id = msgspec.json.decode(_id_decoder(name).decode(text).id)
        else:
            request_id = json.loads(text)[name]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return request_id if is_client_id(request_id) else None


@cache
def _id_decoder(name: str) -> msgspec.json.Decoder[Any]:
    """Return a decoder that looks at one field only, which takes a fortieth of the time."""
    fields = [("id", msgspec.Raw, msgspec.field(name=name, default=msgspec.Raw(b"null")))]
    return msgspec.json.Decoder(msgspec.defstruct("Identified", fields))


def is_client_id(value: object) -> TypeGuard[str]:
    """Whether a value can be an id that a client chose."""
    return isinstance(value, str) and 0 < len(value) <= ID_CHARACTERS_MAX and value.isprintable()


class CalledFunction(Struct, frozen=True):
    """The tool of a call, and its arguments as JSON text."""

    name: str
    arguments: str


class CallOfTool(Struct, frozen=True):
    """A call in a message, as the chat completions API has it."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class Message(Struct, frozen=True):
    """A message as people see it."""

    id: UUID
    role: Role
    content: str
    tool_calls: Sequence[CallOfTool] | None
    tool_name: str | None
    tool_call_id: str | None
    status: MessageStatus
    turn_id: UUID | None
    created_at: Time


class ErrorDetail(Struct, frozen=True):
    """The reason why a turn failed: one of the error codes, and a message that people can act on."""

    code: str
    message: str
    retryable: bool


class Usage(Struct, frozen=True):
    """The cost of a turn: tokens of all its model requests (null if the agent does not say), and its duration."""

    input_tokens: int | None
    output_tokens: int | None
    model: str | None
    seconds: float


class ServerFrame(Struct, frozen=True, tag_field="type"):
    """Base of every frame that the server sends."""


class JournalFrame(ServerFrame, frozen=True):
    """A frame from the journal. `seq` of a merged frame is that of its last event."""

    conversation_id: UUID
    seq: int


class MessageCreated(JournalFrame, frozen=True, tag="message.created"):
    """A message was added."""

    message: Message


class TurnStarted(JournalFrame, frozen=True, tag="turn.started"):
    """A turn begins to answer the message with this `message_id`."""

    turn_id: UUID
    message_id: str


class TurnDelta(JournalFrame, frozen=True, tag="turn.delta"):
    """The answer goes on with more text."""

    turn_id: UUID
    text: str


class TurnToolCall(JournalFrame, frozen=True, tag="turn.tool_call"):
    """The agent calls a tool."""

    turn_id: UUID
    tool_call_id: str
    tool_name: str
    arguments: dict[str, Any]


class TurnToolResult(JournalFrame, frozen=True, tag="turn.tool_result"):
    """A tool has answered."""

    turn_id: UUID
    tool_call_id: str
    tool_name: str
    content: str
    is_error: bool


class TurnRestarted(JournalFrame, frozen=True, tag="turn.restarted"):
    """Another node goes on with the turn; replace what you show of it by `text`."""

    turn_id: UUID
    epoch: int
    text: str


class TurnCompleted(JournalFrame, frozen=True, tag="turn.completed"):
    """The turn is over; `message` is the answer."""

    turn_id: UUID
    message: Message
    usage: Usage


class TurnCancelled(JournalFrame, frozen=True, tag="turn.cancelled"):
    """The turn was stopped; `message` holds what was said up to then."""

    turn_id: UUID
    message: Message


class TurnFailed(JournalFrame, frozen=True, tag="turn.failed"):
    """The turn could not be finished; `message` holds what was said up to then."""

    turn_id: UUID
    message: Message
    error: ErrorDetail


class Ready(ServerFrame, frozen=True, tag="ready"):
    """The connection is authenticated."""

    user_id: str
    node_id: str
    protocol: str
    heartbeat_seconds: float


class Heartbeat(ServerFrame, frozen=True, tag="heartbeat"):
    """The node is alive and had nothing else to say."""


class RunningTurn(Struct, frozen=True):
    """The running turn, and its text so far."""

    turn_id: UUID
    text: str


class ConversationSnapshot(ServerFrame, frozen=True, tag="conversation.snapshot"):
    """The newest messages of a conversation and its running turn, as of `seq`. `has_older`: older messages are left
    out; they can be read over HTTP, before the first of these."""

    conversation_id: UUID
    messages: Sequence[Message]
    turn: RunningTurn | None
    seq: int
    has_older: bool = False


class Error(ServerFrame, frozen=True, tag="error"):
    """A frame was refused; the connection lives on. With `rate_limited` it says after how many milliseconds to try
    again, and, where the limit that was reached has a name, which `limit` it is and its value, `limit_max`."""

    code: str
    message: str
    retryable: bool
    request_id: str | UnsetType = UNSET
    conversation_id: UUID | UnsetType = UNSET
    limit: str | UnsetType = UNSET
    limit_max: int | UnsetType = UNSET
    retry_after_ms: int | UnsetType = UNSET


class AuthExpiring(ServerFrame, frozen=True, tag="auth.expiring"):
    """The token runs out at `expires_at` (Unix seconds); send `auth` with a newer one."""

    expires_at: float


class Goaway(ServerFrame, frozen=True, tag="goaway"):
    """The node goes down at `deadline` (Unix seconds); reconnect to reach another one."""

    reason: str
    deadline: float


class Pong(ServerFrame, frozen=True, tag="pong"):
    """The node answers a `ping`."""

    request_id: str | UnsetType = UNSET


JOURNAL_FRAMES: tuple[type[JournalFrame], ...] = (
    MessageCreated,
    TurnStarted,
    TurnDelta,
    TurnToolCall,
    TurnToolResult,
    TurnRestarted,
    TurnCompleted,
    TurnCancelled,
    TurnFailed,
)
AnyServerFrame: TypeAlias = (
    MessageCreated
    | TurnStarted
    | TurnDelta
    | TurnToolCall
    | TurnToolResult
    | TurnRestarted
    | TurnCompleted
    | TurnCancelled
    | TurnFailed
    | Ready
    | Heartbeat
    | ConversationSnapshot
    | Error
    | AuthExpiring
    | Goaway
    | Pong
)
