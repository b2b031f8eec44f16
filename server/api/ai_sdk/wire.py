"""What the AI SDK's chat transports send, and the frames that its WebSocket transport is sent. Pure.

Fields that are not used here are ignored, as clients of later versions send more of them; what is used is checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from anynode.models.text import is_storable
from anynode.server.errors import InvalidFrame, Problem
from anynode.server.protocol.encoding import encode
from anynode.server.protocol.frames import ID_CHARACTERS_MAX, SEQ_MAX, ClientId, Cursor, is_client_id

SUBPROTOCOL: Final = "anynode.ai-sdk"
# Of a request: by default a client posts all messages of the chat with each question.
REQUEST_BYTES_MAX: Final = 4_194_304

Messages: TypeAlias = Annotated[
    list[Annotated[Raw, Meta(extra_json_schema={"type": "object"})]],
    Meta(min_length=1, description="`UIMessage`s, of which only the last counts: the user's, with parts of text."),
]
IfBusy: TypeAlias = Literal["reject", "interrupt"]
Trigger: TypeAlias = Literal["submit-message", "regenerate-message"]


class ChatRequest(Struct, frozen=True, rename={"message_id": "messageId"}):
    """A question in a chat, or with `regenerate-message` the last one again. Of the messages only the last counts, as
    the history comes from Postgres; it must be the user's, and its id makes the request repeatable."""

    id: ClientId
    messages: Messages
    trigger: Trigger = "submit-message"
    message_id: str | None = None
    if_busy: IfBusy = "reject"


class Options(Struct, frozen=True):
    """What a client may say in the `body` of the WebSocket transport."""

    if_busy: IfBusy = "reject"


class ResumeOptions(Struct, frozen=True):
    """The same with a `resume`: `wait_after` is the last message that the client shows, by the id that it shows."""

    wait_after: ClientId | None = None


class Frame(Struct, frozen=True, tag_field="type", rename={"request_id": "requestId"}):
    """A frame of the WebSocket transport."""

    request_id: ClientId


class SendFrame(Frame, frozen=True, tag="send", rename={"request_id": "requestId", "message_id": "messageId"}):
    """The same over the WebSocket."""

    id: ClientId
    trigger: Trigger
    messages: Messages
    message_id: str | None = None
    headers: dict[str, str] = {}
    body: Options = Options()

    @property
    def if_busy(self) -> IfBusy:
        """What to do while another turn runs."""
        return self.body.if_busy


class ResumeFrame(
    Frame, frozen=True, tag="resume", rename={"request_id": "requestId", "last_sequence": "lastSequence"}
):
    """Show the turn that runs in a chat, or has answered last, from its beginning, or after a sequence number; or wait
    until the chat has something newer than a message, and show nothing."""

    id: ClientId
    last_sequence: Cursor | None = None
    headers: dict[str, str] = {}
    body: ResumeOptions = ResumeOptions()

    @property
    def wait_after(self) -> str | None:
        """The message to wait for something newer than, None where nothing is waited for."""
        return self.body.wait_after


class AbortFrame(Frame, frozen=True, tag="abort"):
    """Stop the turn that a request shows."""


AnyFrame: TypeAlias = SendFrame | ResumeFrame | AbortFrame
AnySend: TypeAlias = ChatRequest | SendFrame
AnyRequest = TypeVar("AnyRequest")


class Part(Struct, frozen=True):
    """A part of a message."""

    type: str
    text: str | UnsetType = UNSET


class UserMessage(Struct, frozen=True):
    """The last of the posted messages, less what is not looked at."""

    id: ClientId
    role: str
    parts: list[Part]

    @property
    def text(self) -> str:
        """What it says."""
        return "".join(part.text for part in self.parts if part.text is not UNSET)


_FRAMES: Final = msgspec.json.Decoder(AnyFrame)
_MESSAGES: Final = msgspec.json.Decoder(UserMessage)


def decode_frame(text: str) -> AnyFrame:
    """One frame. Raises InvalidFrame."""
    frame: AnyFrame = _decoded(text, _FRAMES, "the frame")
    for name, value in (("requestId", frame.request_id), ("id", getattr(frame, "id", "-"))):
        _check_id(name, value)
    if isinstance(frame, ResumeFrame) and frame.wait_after is not None:
        _check_id("body.wait_after", frame.wait_after)
    return frame


def decode_request(data: bytes, kinds: Sequence[Any]) -> Any:
    """The body of a request over HTTP, of the one kind there is. Raises InvalidFrame."""
    request = _decoded(data or b"{}", msgspec.json.Decoder(kinds[0]), "the body")
    _check_id("id", getattr(request, "id", "-"))
    return request


def question_in(request: AnySend) -> UserMessage:
    """The message that is asked, or asked again. Raises InvalidFrame."""
    place = f"messages[{len(request.messages) - 1}]"
    message: UserMessage = _decoded(bytes(request.messages[-1]), _MESSAGES, place)
    if message.role != "user":
        said = "is not the user's: only questions are taken, and tools run on the server"
        raise InvalidFrame(problems=[Problem(place, said)])
    _check_id(f"{place}.id", message.id)
    for number, part in enumerate(message.parts):
        if part.type != "text" or part.text is UNSET:
            raise InvalidFrame(problems=[Problem(f"{place}.parts[{number}]", "is no text, and nothing else is taken")])
    if not is_storable(message.text):
        raise InvalidFrame(problems=[Problem(place, "has a NUL")])
    return message


def token_in(headers: Mapping[str, str]) -> str | None:
    """The token in the `headers` of a frame, which no proxy sees."""
    for name, value in headers.items():
        scheme, _, token = value.strip().partition(" ")
        if name.lower() == "authorization" and scheme.lower() == "bearer" and token.strip():
            return token.strip()
    return None


def start_frame(request_id: str) -> str:
    """There is a turn to resume."""
    return encode({"type": "start", "requestId": request_id})


def chunk_head(request_id: str) -> str:
    """What comes before the sequence number of every `chunk` of a request."""
    return f'{{"type":"chunk","requestId":{encode(request_id)},"sequence":'


def end_frame(request_id: str) -> str:
    """The turn is over, and shown to its end."""
    return encode({"type": "end", "requestId": request_id})


def no_active_frame(request_id: str) -> str:
    """There is nothing to resume."""
    return encode({"type": "no-active", "requestId": request_id})


def error_frame(request_id: str, message: str) -> str:
    """The request is refused."""
    return encode({"type": "error", "requestId": request_id, "errorText": message})


# Of no request: the transport passes over frames with a `requestId` that it does not know, and gives none like this.


def ready_frame(node_id: str, heartbeat_seconds: float) -> str:
    """The connection is authenticated."""
    ready = {"type": "ready", "requestId": "", "node_id": node_id, "heartbeat_seconds": heartbeat_seconds}
    return encode(ready)


def heartbeat_frame() -> str:
    """The node lives, and had nothing else to send."""
    return encode({"type": "heartbeat", "requestId": ""})


def _check_id(name: str, value: str) -> None:
    if not is_client_id(value):
        raise InvalidFrame(problems=[Problem(name, f"is not 1 to {ID_CHARACTERS_MAX} printable characters")])


def _decoded(data: str | bytes, decoder: msgspec.json.Decoder[AnyRequest], noun: str) -> AnyRequest:
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:  # a ValidationError is a DecodeError
        raise InvalidFrame(f"{noun}: {error}") from None


assert SEQ_MAX >= 2**53  # a sequence number is a safe integer of JavaScript
