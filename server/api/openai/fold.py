"""The events of the Responses API, made of a turn's events. Pure.

The same events make the same stream events on every node and at every replay, with the same sequence numbers. So a
stream event depends on nothing but the journal: no clock, no request, and not the text of a JSON object, as Postgres
returns its keys in another order.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, assert_never
from uuid import UUID

import msgspec

from anynode.models.events import Event
from anynode.models.ids import made_at
from anynode.models.rules import CANCELLED, COMPLETED
from anynode.server.agents.agent import ToolResult
from anynode.server.api.openai.bodies import (
    CallError,
    CallErrorText,
    CallStatus,
    ItemStatus,
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputText,
    ResponseError,
    ResponseObject,
    ResponseStatus,
    ResponseUsage,
    conversation_name,
    response_id_of,
)
from anynode.server.api.openai.wire import (
    CallArgumentsDone,
    CallCompleted,
    CallFailed,
    CallInProgress,
    Completed,
    ContentPartAdded,
    ContentPartDone,
    Created,
    Failed,
    Incomplete,
    InProgress,
    ItemAdded,
    ItemDone,
    OutputTextDelta,
    OutputTextDone,
    PartEvent,
    ResponseEvent,
    StreamEvent,
)
from anynode.server.engine.turn_events import (
    TurnCalled,
    TurnDelta,
    TurnEnded,
    TurnRestarted,
    TurnStarted,
    decode_event,
    events_of_stored,
)
from anynode.server.protocol.bodies import StoredTurn
from anynode.server.protocol.frames import Usage

WHOLE_NUMBER_MIN: Final = -(2**63)  # what JSON encoders write digit by digit
WHOLE_NUMBER_MAX: Final = 2**64 - 1


@dataclass(slots=True)
class ShownText:
    """A message of the output; `texts` are its deltas."""

    id: str
    output_index: int
    texts: list[str]
    status: ItemStatus = "in_progress"

    @property
    def text(self) -> str:
        """All text of the message."""
        return "".join(self.texts)

    def item(self) -> OutputMessage:
        """Return the message as an item of the output."""
        return OutputMessage(self.id, self.status, [OutputText(self.text)] if self.texts else [])


@dataclass(slots=True)
class ShownCall:
    """A call in the output."""

    id: str
    output_index: int
    tool_call_id: str
    name: str
    arguments: str
    result: ToolResult | None = None
    status: CallStatus = "in_progress"

    def item(self, *, is_new: bool = False) -> OutputCall:
        """Return the call as an item of the output; the arguments of a new one come in later events."""
        arguments = "" if is_new else self.arguments
        if self.result is None:
            return OutputCall(self.id, self.status, self.name, arguments)
        content = self.result.content
        error = CallError([CallErrorText(content)]) if self.result.is_error else None
        return OutputCall(self.id, self.status, self.name, arguments, content, error)


Shown: TypeAlias = ShownText | ShownCall


class Fold:
    """The stream of one turn, from the turn's first event on.

    `model` is the name that is shown until the turn's usage says which model answered.
    """

    def __init__(self, turn_id: UUID, conversation_id: UUID, model: str) -> None:
        self._turn_id = turn_id
        self._conversation_id = conversation_id
        self._model = model
        self._shown = 0  # items, those that were taken back included
        self._standing: list[Shown] = []
        self._open: ShownText | None = None
        self._events: list[StreamEvent] = []  # of the event that is being folded
        self.sequence_number = 0  # of the next stream event

    def add(self, event: Event) -> Sequence[StreamEvent]:
        """Return the events that the turn's next event adds to the stream."""
        self._events = []
        match decode_event(event.type, event.payload):
            case TurnDelta(text):
                self._say(text)
            case TurnStarted():
                self._start()
            case TurnCalled() as call:
                self._call(call)
            case ToolResult() as result:
                self._answer(result)
            case TurnRestarted(text):
                self._restart(text)
            case TurnEnded() as end:
                self._end(end)
            case None:
                pass
            case unknown:
                assert_never(unknown)
        return self._events

    def response(self) -> ResponseObject:
        """Return the response while the turn runs."""
        return self._response("in_progress")

    def _start(self) -> None:
        for kind in (Created, InProgress):
            self._add(kind, response=self.response())

    def _say(self, text: str) -> None:
        shown = self._open
        if shown is None:
            shown = self._open = ShownText(f"msg_{self._turn_id.hex}_{self._shown}", self._shown, [])
            self._show(shown, shown.item())
            self._add_of(shown, ContentPartAdded, part=OutputText(""))
        shown.texts.append(text)
        self._add_of(shown, OutputTextDelta, delta=text)

    def _call(self, call: TurnCalled) -> None:
        self._close_text()
        id, arguments = f"mcp_{self._turn_id.hex}_{self._shown}", canonical(call.arguments)
        shown = ShownCall(id, self._shown, call.tool_call_id, call.tool_name, arguments)
        self._show(shown, shown.item(is_new=True))
        self._add_of(shown, CallInProgress)
        self._add_of(shown, CallArgumentsDone, arguments=arguments)

    def _answer(self, result: ToolResult) -> None:
        self._close_text()
        for shown in self._standing:
            if isinstance(shown, ShownCall) and shown.result is None and shown.tool_call_id == result.tool_call_id:
                shown.result = result
                shown.status = "failed" if result.is_error else "completed"
                self._add_of(shown, CallFailed if result.is_error else CallCompleted)
                self._done(shown)
                return

    def _restart(self, text: str) -> None:
        """Take back what was shown beyond `text`, from which another node goes on, and calls that have no answer."""
        standing: list[Shown] = []
        taken_back: list[Shown] = []
        rest, is_cut = text, False
        for shown in self._standing:
            if isinstance(shown, ShownCall):
                stands = shown.result is not None
            else:
                stands = not is_cut and rest.startswith(shown.text)
                if stands:
                    rest = rest[len(shown.text) :]
                else:
                    is_cut = True
            (standing if stands else taken_back).append(shown)
        for shown in taken_back:
            self._take_back(shown)
        self._standing = standing
        if rest:
            self._say(rest)

    def _end(self, end: TurnEnded) -> None:
        self._close_text("completed" if end.status == COMPLETED else "incomplete")
        for shown in [shown for shown in self._standing if isinstance(shown, ShownCall) and shown.result is None]:
            self._standing.remove(shown)
            self._take_back(shown)
        at = int(end.message.created_at.timestamp())
        if end.status == COMPLETED:
            self._add(Completed, response=self._response("completed", end, completed_at=at))
        elif end.status == CANCELLED:
            self._add(Incomplete, response=self._response("cancelled", end))
        else:
            self._add(Failed, response=self._response("failed", end))

    def _show(self, shown: Shown, item: OutputItem) -> None:
        self._shown += 1
        self._standing.append(shown)
        self._add(ItemAdded, output_index=shown.output_index, item=item)

    def _close_text(self, status: ItemStatus = "completed") -> None:
        if (shown := self._open) is None:
            return
        self._open = None
        shown.status = status
        self._add_of(shown, OutputTextDone, text=shown.text)
        self._add_of(shown, ContentPartDone, part=OutputText(shown.text))
        self._done(shown)

    def _take_back(self, shown: Shown) -> None:
        if shown is self._open:
            self._close_text("incomplete")
        else:
            shown.status = "incomplete"
            self._done(shown)

    def _done(self, shown: Shown) -> None:
        self._add(ItemDone, output_index=shown.output_index, item=shown.item())

    def _add_of(self, shown: Shown, kind: type[PartEvent], **fields: Any) -> None:
        self._add(kind, item_id=shown.id, output_index=shown.output_index, **fields)

    def _add(self, kind: type[StreamEvent], **fields: Any) -> None:
        self._events.append(kind(sequence_number=self.sequence_number, **fields))
        self.sequence_number += 1

    def _response(
        self, status: ResponseStatus, end: TurnEnded | None = None, *, completed_at: int | None = None
    ) -> ResponseObject:
        usage = None if end is None else end.usage
        error = None if end is None else end.error
        return ResponseObject(
            id=response_id_of(self._turn_id),
            created_at=int(made_at(self._turn_id)),
            status=status,
            completed_at=completed_at,
            conversation=conversation_name(self._conversation_id),
            error=None if error is None else ResponseError(error.message),
            model=(usage and usage.model) or self._model,
            output=[] if end is None else [shown.item() for shown in self._standing],
            usage=_usage(usage),
        )


def _usage(usage: Usage | None) -> ResponseUsage | None:
    if usage is None or usage.input_tokens is None or usage.output_tokens is None:
        return None
    return ResponseUsage(usage.input_tokens, usage.output_tokens, usage.input_tokens + usage.output_tokens)


def canonical(arguments: msgspec.Raw | str) -> str:
    """Return a JSON object as the same text, whether it comes from an agent or from Postgres.

    Postgres sorts keys in its own way, and writes 1e3 as 1000.
    """
    text = arguments if isinstance(arguments, str) else bytes(arguments).decode()
    try:
        return msgspec.json.encode(_plain(json.loads(text)), order="sorted").decode()
    except RecursionError:  # nested a few hundred deep: better another text than no stream
        return text


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if WHOLE_NUMBER_MIN <= value <= WHOLE_NUMBER_MAX:
        return int(value) if value == int(value) else value
    return float(value)


# Of a turn whose journal is gone.


def stored_response(stored: StoredTurn, model: str) -> ResponseObject:
    """Return a stored turn as a response."""
    last = stored_events(stored, model)[-1]
    assert isinstance(last, ResponseEvent)
    return last.response


def stored_events(stored: StoredTurn, model: str) -> list[StreamEvent]:
    """Return the stream of a stored turn, with one delta for each message."""
    fold = Fold(stored.turn_id, stored.conversation_id, model)
    return [shown for event in events_of_stored(stored) for shown in fold.add(event)]
