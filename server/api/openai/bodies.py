"""The requests and answers of the Responses API as types, and how requests are decoded. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, TypeAlias
from uuid import UUID

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType, field

from anynode.server.errors import InvalidFrame, Problem
from anynode.server.protocol.bodies import TEXT_PARTS_MAX, Body, Content
from anynode.server.protocol.decoding import json_object
from anynode.server.protocol.frames import NOT_BLANK, SEQ_MAX

SERVER_LABEL: Final = "anynode"
FROM_CONVERSATION: Final = "the history comes from the conversation: name it, and send the new question only"
_RESPONSE: Final = re.compile(r"^resp_([0-9a-f]{32})$")
_CONVERSATION: Final = re.compile(
    r"^(?:conv_([0-9a-f]{32})|([0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}))$"
)

# Only said in the schemas, as in `anynode.server.protocol.bodies`; `conversation_id` and `previous_turn_id` check them.
ConversationId: TypeAlias = Annotated[str, Meta(extra_json_schema={"pattern": _CONVERSATION.pattern})]
ResponseId: TypeAlias = Annotated[str, Meta(extra_json_schema={"pattern": _RESPONSE.pattern})]

# Requests. Fields that are not listed are ignored: clients are often newer, and most of what they can say is advice.


class ResponseQuery(Body, frozen=True):
    """How to get a response: as an object, or as a stream of all its events or those after a sequence number."""

    stream: bool = False
    starting_after: Annotated[int, Meta(ge=0, le=SEQ_MAX)] | UnsetType = UNSET
    include: str | UnsetType = field(default=UNSET, name="include[]")  # has no meaning here, as the next
    include_obfuscation: bool | UnsetType = UNSET


class InputText(Struct, frozen=True, tag_field="type", tag="input_text"):
    """A part of a question; only text can be asked."""

    text: str


InputParts: TypeAlias = Annotated[  # not all of them blank
    list[InputText],
    Meta(
        min_length=1,
        max_length=TEXT_PARTS_MAX,
        extra_json_schema={"contains": {"properties": {"text": {"pattern": NOT_BLANK.pattern}}}},
    ),
]


class InputMessage(Struct, frozen=True):
    """A question as an input item."""

    role: Literal["user"]
    content: Content | InputParts
    type: Literal["message"] = "message"


class ConversationName(Struct, frozen=True):
    """A conversation, named by its id."""

    id: ConversationId


class CreateResponse(Struct, frozen=True):
    """A question: in a new conversation, in a named one, or in that of the response before it.

    Other fields of the API are ignored where they do not change what the answer means, and refused where they would.
    """

    input: Content | Annotated[list[InputMessage], Meta(min_length=1, max_length=1)]
    conversation: ConversationId | ConversationName | None = None
    previous_response_id: ResponseId | None = None
    background: bool | None = None
    stream: bool | None = None
    model: str | None = None

    @property
    def question(self) -> str:
        """The text of the question."""
        if isinstance(self.input, str):
            return self.input
        content = self.input[-1].content
        return content if isinstance(content, str) else "".join(part.text for part in content)

    @property
    def conversation_id(self) -> UUID | None:
        """The id of the conversation that the request names. Raises InvalidFrame."""
        named = self.conversation
        if named is None:
            return None
        match = _CONVERSATION.fullmatch(named if isinstance(named, str) else named.id)
        if match is None:
            path = "conversation" if isinstance(named, str) else "conversation.id"
            raise InvalidFrame(problems=[Problem(path, "is not the id of a conversation")])
        return UUID(match[1] or match[2])

    @property
    def previous_turn_id(self) -> UUID | None:
        """The id of the turn that the request continues. Raises InvalidFrame."""
        if self.previous_response_id is None:
            return None
        turn_id = turn_of(self.previous_response_id)
        if turn_id is None:
            raise InvalidFrame(problems=[Problem("previous_response_id", "is not the id of a response")])
        return turn_id


def decode_request(data: bytes, kinds: Sequence[Any]) -> Any:
    """Return a request, as the last of the kinds. Raises InvalidFrame."""
    value = json_object(data)
    if problems := list(_refused(value)):
        raise InvalidFrame(problems=problems)
    try:
        return msgspec.convert(value, kinds[-1])
    except msgspec.ValidationError as error:
        said, _, place = str(error).partition(" - at `$")
        raise InvalidFrame(problems=[Problem(place.strip(".`"), said)]) from None


def _refused(value: Mapping[str, Any]) -> Iterator[Problem]:
    """Return the fields that would change what the answer means, and that this server does not support."""
    if value.get("instructions"):
        yield Problem("instructions", "are not taken here: give the conversation a system prompt")
    if value.get("tools"):
        yield Problem("tools", "are not taken here: those of the server are called by the server")
    if value.get("tool_choice") not in (None, "auto"):
        yield Problem("tool_choice", 'can only be "auto"')
    if value.get("prompt") is not None:
        yield Problem("prompt", "is not known here: send the question as `input`")
    if value.get("store") is False:
        yield Problem("store", "cannot be false: every turn is stored, so that any node can go on with it")
    if value.get("conversation") is not None and value.get("previous_response_id") is not None:
        yield Problem("previous_response_id", "cannot be given together with `conversation`")
    if _format_in(value.get("text")) not in (None, "text"):
        yield Problem("text.format", 'can only be {"type": "text"}')
    if "input" not in value:
        yield Problem("input", "is missing")
    elif isinstance(value["input"], list):
        yield from _refused_items(value["input"])


def _refused_items(items: Sequence[Any]) -> Iterator[Problem]:
    if len(items) != 1:
        yield Problem("input", f"has {len(items)} items, not exactly one user message; {FROM_CONVERSATION}")
        return
    item = items[0]
    if not isinstance(item, dict):
        return  # of a wrong kind, which is told when it is converted
    kind, role = item.get("type", "message"), item.get("role")
    if kind != "message" or role != "user":
        what = f"{role!r} message" if kind == "message" else f"{kind!r}"
        yield Problem("input[0]", f"is a {what[:80]}, not a user message; {FROM_CONVERSATION}")
    elif isinstance(item.get("content"), list):
        for number, part in enumerate(item["content"][:TEXT_PARTS_MAX]):
            if isinstance(part, dict) and part.get("type") != "input_text":
                yield Problem(f"input[0].content[{number}]", "is no `input_text`, and only text can be asked")


def _format_in(text: Any) -> Any:
    form = text.get("format") if isinstance(text, dict) else None
    return form.get("type") if isinstance(form, dict) else None


# Ids.


def response_id_of(turn_id: UUID) -> str:
    """Return the id of the response that a turn is."""
    return f"resp_{turn_id.hex}"


def turn_of(response_id: str) -> UUID | None:
    """Return the id of the turn that a response is, None where the text is no response's id."""
    match = _RESPONSE.fullmatch(response_id)
    return None if match is None else UUID(match[1])


def conversation_name(conversation_id: UUID) -> ConversationName:
    """Return the name of a conversation in responses."""
    return ConversationName(f"conv_{conversation_id.hex}")


# Responses.

ItemStatus: TypeAlias = Literal["in_progress", "completed", "incomplete"]
CallStatus: TypeAlias = Literal["in_progress", "completed", "incomplete", "failed"]
ResponseStatus: TypeAlias = Literal["in_progress", "completed", "cancelled", "failed"]


class OutputText(Struct, frozen=True, tag_field="type", tag="output_text"):
    """The text of a message."""

    text: str
    annotations: Sequence[Any] = ()
    logprobs: Sequence[Any] = ()


class OutputMessage(Struct, frozen=True, tag_field="type", tag="message"):
    """Text that was said between calls; `incomplete`: cut short, or taken back."""

    id: str
    status: ItemStatus
    content: Sequence[OutputText]
    role: Literal["assistant"] = "assistant"


class CallErrorText(Struct, frozen=True, tag_field="type", tag="text"):
    """The text with which a tool has failed."""

    text: str


class CallError(Struct, frozen=True, tag_field="type", tag="mcp_tool_execution_error"):
    """A tool has failed; the model was told of it."""

    content: Sequence[CallErrorText]


class OutputCall(Struct, frozen=True, tag_field="type", tag="mcp_call"):
    """A call of a tool that the server has run; `arguments` is JSON text."""

    id: str
    status: CallStatus
    name: str
    arguments: str
    output: str | None = None
    error: CallError | None = None
    server_label: str = SERVER_LABEL
    approval_request_id: None = None


OutputItem: TypeAlias = OutputMessage | OutputCall


class ResponseError(Struct, frozen=True):
    """Why a response has failed."""

    message: str
    code: Literal["server_error"] = "server_error"


class InputTokensDetails(Struct, frozen=True):
    """Details of the input tokens; always zero, as they are not counted here."""

    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputTokensDetails(Struct, frozen=True):
    """Details of the output tokens; always zero, as they are not counted here."""

    reasoning_tokens: int = 0


class ResponseUsage(Struct, frozen=True):
    """The tokens of all model requests of a turn."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputTokensDetails = InputTokensDetails()
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()


class PlainText(Struct, frozen=True, tag_field="type", tag="text"):
    """Text as it comes."""


class TextSettings(Struct, frozen=True):
    """How text is answered."""

    format: PlainText = PlainText()


class ResponseObject(Struct, frozen=True, kw_only=True):
    """A turn as a response; `output` holds what stands of it when it is over.

    A turn runs and is kept even if nobody listens, so `background` and `store` are true. The request is not kept.
    """

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: ResponseStatus
    background: bool = True
    completed_at: int | None = None
    conversation: ConversationName
    error: ResponseError | None = None
    incomplete_details: None = None
    instructions: None = None
    max_output_tokens: None = None
    metadata: Mapping[str, str] = {}
    model: str
    output: Sequence[OutputItem] = ()
    parallel_tool_calls: bool = True
    previous_response_id: str | None = None
    store: bool = True
    temperature: None = None
    text: TextSettings = TextSettings()
    tool_choice: Literal["auto"] = "auto"
    tools: Sequence[Any] = ()
    top_p: None = None
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None


class Model(Struct, frozen=True):
    """The agent of this server, as a model."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = SERVER_LABEL


class Models(Struct, frozen=True):
    """The list of models, which has one entry."""

    data: Sequence[Model]
    object: Literal["list"] = "list"
