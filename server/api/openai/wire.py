"""The events that a stream of the Responses API is made of, as types. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from anynode.server.api.openai.bodies import OutputItem, OutputText, ResponseObject


class StreamEvent(Struct, frozen=True, kw_only=True, tag_field="type"):
    """The base of all events of a stream."""

    sequence_number: int


class ResponseEvent(StreamEvent, frozen=True, kw_only=True):
    """An event that shows the whole response."""

    response: ResponseObject


class Created(ResponseEvent, frozen=True, tag="response.created"):
    """The turn is admitted."""


class InProgress(ResponseEvent, frozen=True, tag="response.in_progress"):
    """The turn runs."""


class Completed(ResponseEvent, frozen=True, tag="response.completed"):
    """The turn is complete, and `response` holds what stands of it."""


class Incomplete(ResponseEvent, frozen=True, tag="response.incomplete"):
    """The turn was cancelled, which the response's status says: the API has no event of its own for it."""


class Failed(ResponseEvent, frozen=True, tag="response.failed"):
    """The turn has failed."""


class ItemEvent(StreamEvent, frozen=True, kw_only=True):
    """An event that shows a whole item."""

    output_index: int
    item: OutputItem


class ItemAdded(ItemEvent, frozen=True, tag="response.output_item.added"):
    """An item begins."""


class ItemDone(ItemEvent, frozen=True, tag="response.output_item.done"):
    """An item is over. One that was over may come again, as `incomplete`: it was taken back."""


class PartEvent(StreamEvent, frozen=True, kw_only=True):
    """An event of an item."""

    item_id: str
    output_index: int


class ContentPartAdded(PartEvent, frozen=True, kw_only=True, tag="response.content_part.added"):
    """The text of a message begins."""

    part: OutputText
    content_index: int = 0


class OutputTextDelta(PartEvent, frozen=True, kw_only=True, tag="response.output_text.delta"):
    """More text of a message."""

    delta: str
    content_index: int = 0
    logprobs: Sequence[Any] = ()


class OutputTextDone(PartEvent, frozen=True, kw_only=True, tag="response.output_text.done"):
    """The text of a message is over."""

    text: str
    content_index: int = 0
    logprobs: Sequence[Any] = ()


class ContentPartDone(PartEvent, frozen=True, kw_only=True, tag="response.content_part.done"):
    """The text of a message, as a part of it, is over."""

    part: OutputText
    content_index: int = 0


class CallInProgress(PartEvent, frozen=True, tag="response.mcp_call.in_progress"):
    """A tool is called."""


class CallArgumentsDone(PartEvent, frozen=True, kw_only=True, tag="response.mcp_call_arguments.done"):
    """The arguments of a call are complete."""

    arguments: str


class CallCompleted(PartEvent, frozen=True, tag="response.mcp_call.completed"):
    """A tool has answered."""


class CallFailed(PartEvent, frozen=True, tag="response.mcp_call.failed"):
    """A tool has failed."""


class ErrorEvent(Struct, frozen=True, tag_field="type", tag="error"):
    """The stream ends before the end of its response, for this reason."""

    code: str
    message: str
    sequence_number: int
    param: None = None
