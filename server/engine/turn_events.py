"""The events of a turn as types: what the journal holds of it as JSON, decoded in this one place. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, ClassVar, Final, TypeAlias

import msgspec
from msgspec import Raw, Struct

from anynode.models.events import DELTA, Event, delta_payload
from anynode.models.rules import CANCELLED, COMPLETED, FAILED, RUNNING, TERMINAL_EVENTS, TERMINAL_TYPES
from anynode.server.agents.agent import ToolResult
from anynode.server.protocol.bodies import StoredTurn
from anynode.server.protocol.encoding import encode
from anynode.server.protocol.frames import ErrorDetail, Usage


class TurnStarted(Struct, frozen=True):
    """The turn is admitted."""


class TurnDelta(Struct, frozen=True):
    """More text of the answer."""

    text: str


class TurnCalled(Struct, frozen=True):
    """The model calls a tool; `arguments` is the JSON object as the journal holds it."""

    tool_call_id: str
    tool_name: str
    arguments: Raw

    def decoded_arguments(self) -> Mapping[str, Any]:
        """Return the arguments as Python objects. Raises msgspec.ValidationError where they are no JSON object."""
        arguments: dict[str, Any] = msgspec.json.decode(self.arguments, type=dict[str, Any])
        return arguments


class TurnRestarted(Struct, frozen=True):
    """Another node goes on with the turn; `text` is all of the answer that still stands."""

    text: str


class EndedMessage(Struct, frozen=True):
    """The part of the last message that an ending is shown with."""

    created_at: datetime


class TurnEnded(Struct, frozen=True):
    """The turn is over."""

    status: ClassVar[str]
    message: EndedMessage
    usage: Usage | None = None
    error: ErrorDetail | None = None


class TurnCompleted(TurnEnded, frozen=True):
    """The agent has answered."""

    status = COMPLETED


class TurnCancelled(TurnEnded, frozen=True):
    """Somebody stopped the turn; what was said until then stays."""

    status = CANCELLED


class TurnFailed(TurnEnded, frozen=True):
    """The turn could not be completed; `error` says why."""

    status = FAILED


TurnEvent: TypeAlias = TurnStarted | TurnDelta | TurnCalled | ToolResult | TurnRestarted | TurnEnded

_DECODERS: Final[Mapping[str, msgspec.json.Decoder[TurnEvent]]] = {
    "turn.started": msgspec.json.Decoder(TurnStarted),
    DELTA: msgspec.json.Decoder(TurnDelta),
    "turn.tool_call": msgspec.json.Decoder(TurnCalled),
    "turn.tool_result": msgspec.json.Decoder(ToolResult),
    "turn.restarted": msgspec.json.Decoder(TurnRestarted),
    TERMINAL_EVENTS[COMPLETED]: msgspec.json.Decoder(TurnCompleted),
    TERMINAL_EVENTS[CANCELLED]: msgspec.json.Decoder(TurnCancelled),
    TERMINAL_EVENTS[FAILED]: msgspec.json.Decoder(TurnFailed),
}


def decode_event(type: str, payload: str) -> TurnEvent | None:
    """Return the event of a turn that a row of the journal holds, None for a type that this version does not know.

    Raises msgspec.DecodeError where the payload is not of its type's form.
    """
    decoder = _DECODERS.get(type)
    return None if decoder is None else decoder.decode(payload)


def is_end(event: Event) -> bool:
    """Return whether the event is the last one of its turn."""
    return event.type in TERMINAL_TYPES


def events_of_stored(turn: StoredTurn) -> list[Event]:
    """Return events that show a stored turn whose own events have been deleted: each message is one delta."""
    made: list[tuple[str, str]] = [("turn.started", "{}")]
    for message in turn.messages:
        if message.role == "tool":
            answered = {
                "tool_call_id": message.tool_call_id,
                "tool_name": message.tool_name,
                "content": message.content,
                "is_error": message.status == FAILED,
            }
            made.append(("turn.tool_result", encode(answered)))
            continue
        if message.content:
            made.append((DELTA, delta_payload(message.content)))
        for call in msgspec.to_builtins(message.tool_calls) or ():
            function = call["function"]
            arguments = Raw(function["arguments"].encode())
            called = {"tool_call_id": call["id"], "tool_name": function["name"], "arguments": arguments}
            made.append(("turn.tool_call", encode(called)))
    if turn.status != RUNNING:
        at = turn.messages[-1].created_at if turn.messages else turn.finished_at
        ending = {"message": {"created_at": at}, "usage": turn.usage, "error": turn.error}
        made.append((TERMINAL_EVENTS[turn.status], encode(ending)))
    return [Event(seq, type, str(turn.turn_id), payload) for seq, (type, payload) in enumerate(made)]
