"""The requests of the AI SDK's chat transports, and the frames that its WebSocket transport receives. Pure.

The fields that are used here are checked. Others are ignored, as later versions of the client send more of them.
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
    """A question in a chat, or with `regenerate-message` the last one again.

    Only the last of the messages counts, as the history comes from Postgres. It must be the user's, and its id makes
    the request repeatable.
    """

    id: ClientId
    messages: Messages
    trigger: Trigger = "submit-message"
    message_id: str | None = None
    if_busy: IfBusy = "reject"


class Options(Struct, frozen=True):
    """Options of a `send`, which a client puts into the `body` of the WebSocket transport."""

    if_busy: IfBusy = "reject"


class ResumeOptions(Struct, frozen=True):
    """Options of a `resume`. `wait_after` is the id of the last message that the client shows."""

    wait_after: ClientId | None = None


class Frame(Struct, frozen=True, tag_field="type", rename={"request_id": "requestId"}):
    """A frame of the WebSocket transport."""

    request_id: ClientId


class SendFrame(Frame, frozen=True, tag="send", rename={"request_id": "requestId", "message_id": "messageId"}):
    """A question in a chat, over the WebSocket; see ChatRequest."""

    id: ClientId
    trigger: Trigger
    messages: Messages
    message_id: str | None = None
    headers: dict[str, str] = {}
    body: Options = Options()

    @property
    def if_busy(self) -> IfBusy:
        """Whether to refuse the question or to stop the other turn while one runs."""
        return self.body.if_busy


class ResumeFrame(
    Frame, frozen=True, tag="resume", rename={"request_id": "requestId", "last_sequence": "lastSequence"}
):
    """Show the turn that runs in a chat, or the one that answered last: from its start, or after a sequence number.

    With `wait_after` nothing is shown: the client waits until the chat has something newer than that message.
    """

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
Decoded = TypeVar("Decoded")


class Part(Struct, frozen=True):
    """A part of a message."""

    type: str
    text: str | UnsetType = UNSET


class AskedMessage(Struct, frozen=True):
    """The last of the posted messages, with the fields that are used here."""

    id: ClientId
    role: str
    parts: list[Part]

    @property
    def text(self) -> str:
        """All text of the message."""
        return "".join(part.text for part in self.parts if part.text is not UNSET)


_FRAMES: Final = msgspec.json.Decoder(AnyFrame)
_MESSAGES: Final = msgspec.json.Decoder(AskedMessage)


def decode_frame(text: str) -> AnyFrame:
    """Return the frame in a text. Raises InvalidFrame."""
    frame: AnyFrame = _decoded(text, _FRAMES, "the frame")
    for name, value in (("requestId", frame.request_id), ("id", getattr(frame, "id", "-"))):
        _check_id(name, value)
    if isinstance(frame, ResumeFrame) and frame.wait_after is not None:
        _check_id("body.wait_after", frame.wait_after)
    return frame


def decode_request(data: bytes, kinds: Sequence[Any]) -> Any:
    """Return the body of a request over HTTP, as the first of the kinds. Raises InvalidFrame."""
    request = _decoded(data or b"{}", msgspec.json.Decoder(kinds[0]), "the body")
    _check_id("id", getattr(request, "id", "-"))
    return request


def question_in(request: AnySend) -> AskedMessage:
    """Return the message that a request asks, or asks again. Raises InvalidFrame."""
    place = f"messages[{len(request.messages) - 1}]"
    message: AskedMessage = _decoded(bytes(request.messages[-1]), _MESSAGES, place)
    if message.role != "user":
        said = "is not the user's: only questions are taken, and tools run on the server"
        raise InvalidFrame(problems=[Problem(place, said)])
    _check_id(f"{place}.id", message.id)
    for number, part in enumerate(message.parts):
        if part.type != "text" or part.text is UNSET:
            raise InvalidFrame(
                problems=[Problem(f"{place}.parts[{number}]", "is not text; only text parts are supported")]
            )
    if not is_storable(message.text):
        raise InvalidFrame(problems=[Problem(place, "has a NUL")])
    return message


def token_in(headers: Mapping[str, str]) -> str | None:
    """Return the bearer token in the `headers` of a frame, None where there is none."""
    for name, value in headers.items():
        scheme, _, token = value.strip().partition(" ")
        if name.lower() == "authorization" and scheme.lower() == "bearer" and token.strip():
            return token.strip()
    return None


def start_frame(request_id: str) -> str:
    """Return the frame that says that there is a turn to resume."""
    return encode({"type": "start", "requestId": request_id})


def chunk_head(request_id: str) -> str:
    """Return the text that comes before the sequence number in every `chunk` frame of a request."""
    return f'{{"type":"chunk","requestId":{encode(request_id)},"sequence":'


def end_frame(request_id: str) -> str:
    """Return the frame that says that the turn has been shown to its end."""
    return encode({"type": "end", "requestId": request_id})


def no_active_frame(request_id: str) -> str:
    """Return the frame that says that there is nothing to resume."""
    return encode({"type": "no-active", "requestId": request_id})


def error_frame(request_id: str, message: str) -> str:
    """Return the frame that says why a request is refused."""
    return encode({"type": "error", "requestId": request_id, "errorText": message})


# Of no request: the transport passes over frames with a `requestId` that it does not know, and gives none like this.


def ready_frame(node_id: str, heartbeat_seconds: float) -> str:
    """Return the frame that says that the connection is authenticated."""
    ready = {"type": "ready", "requestId": "", "node_id": node_id, "heartbeat_seconds": heartbeat_seconds}
    return encode(ready)


def heartbeat_frame() -> str:
    """Return the frame that shows that the node lives while it has nothing else to send."""
    return encode({"type": "heartbeat", "requestId": ""})


def _check_id(name: str, value: str) -> None:
    if not is_client_id(value):
        raise InvalidFrame(problems=[Problem(name, f"is not 1 to {ID_CHARACTERS_MAX} printable characters")])


def _decoded(data: str | bytes, decoder: msgspec.json.Decoder[Decoded], noun: str) -> Decoded:
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:  # a ValidationError is a DecodeError
        raise InvalidFrame(f"{noun}: {error}") from None


assert SEQ_MAX >= 2**53  # a sequence number is a safe integer of JavaScript
