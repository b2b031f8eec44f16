"""Encoding of frames. JSON from the journal goes into frames without being decoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

import asyncpg
import msgspec
from msgspec import UNSET

from anynode.models.conversations import Snapshot
from anynode.models.events import DELTA, Event, delta_text
from anynode.server.errors import ClientError, RateLimited
from anynode.server.protocol.frames import ConversationSnapshot, Error, Message, RunningTurn, Usage

_encoder = msgspec.json.Encoder()
_USAGE = msgspec.json.Decoder(Usage)


def encode(value: Any) -> str:
    """Encode a frame, or a part of one, as JSON text."""
    return _encoder.encode(value).decode()


def tool_calls_of(stored: str | None) -> Any:
    """Decode the `tool_calls` of a stored message."""
    return None if stored is None else msgspec.json.decode(stored)


def usage_of(stored: str | None) -> Usage | None:
    """Decode the usage of a stored turn."""
    return None if stored is None else _USAGE.decode(stored)


def error_frame(error: ClientError, request_id: str | None) -> str:
    """Encode the `error` frame of a refusal."""
    conversation_id = error.conversation_id or UNSET
    limits = limit_fields(error)
    return encode(Error(error.code, error.message, error.retryable, request_id or UNSET, conversation_id, **limits))


def limit_fields(error: ClientError) -> dict[str, Any]:
    """Return the fields by which an error says which limit was reached, and after how long to try again."""
    if not isinstance(error, RateLimited):
        return {}
    limit, limit_max = error.limit or UNSET, UNSET if error.limit_max is None else error.limit_max
    return {"limit": limit, "limit_max": limit_max, "retry_after_ms": error.retry_after_ms}


def message_of(row: asyncpg.Record | Mapping[str, Any]) -> Message:
    """Return the message in a row that has its fields."""
    return Message(
        row["id"],
        row["role"],
        row["content"],
        tool_calls_of(row["tool_calls"]),
        row["tool_name"],
        row["tool_call_id"],
        row["status"],
        row["turn_id"],
        row["created_at"],
    )


def snapshot_frame(conversation_id: UUID, snapshot: Snapshot) -> str:
    """Encode the `conversation.snapshot` frame of a snapshot."""
    messages = [message_of(row) for row in snapshot.messages]
    turn = None
    if snapshot.running_turn_id is not None:
        turn = RunningTurn(snapshot.running_turn_id, snapshot.running_text)
    return encode(ConversationSnapshot(conversation_id, messages, turn, snapshot.seq, snapshot.has_older))


def event_frames(conversation_id: UUID | str, events: Sequence[Event]) -> list[str]:
    """Encode events as frames; adjacent deltas of a turn are merged into one frame."""
    if len(events) == 1:
        return [_event_frame(conversation_id, events[0])]
    return [frame for _, frame in numbered_frames(conversation_id, events)]


def numbered_frames(conversation_id: UUID | str, events: Sequence[Event]) -> list[tuple[int, str]]:
    """Encode events as frames, like `event_frames`, each with its seq; a merged frame has that of its last event."""
    frames = []
    start = 0
    while start < len(events):
        first = events[start]
        end = start + 1
        if first.type == DELTA:
            while end < len(events) and events[end].type == DELTA and events[end].turn_id == first.turn_id:
                end += 1
        if end - start == 1:
            frame = _event_frame(conversation_id, first)
        else:
            text = "".join(map(delta_text, events[start:end]))
            frame = _head(conversation_id, events[end - 1]) + ',"text":' + encode(text) + "}"
        frames.append((events[end - 1].seq, frame))
        start = end
    return frames


def _event_frame(conversation_id: UUID | str, event: Event) -> str:
    # The payload is a JSON object already: its fields follow those that every frame has.
    if event.frame is None:
        event.frame = _head(conversation_id, event) + "," + event.payload[1:]
    return event.frame


def _head(conversation_id: UUID | str, event: Event) -> str:
    turn = f',"turn_id":"{event.turn_id}"' if event.type.startswith("turn.") else ""
    return f'{{"type":"{event.type}","conversation_id":"{conversation_id}","seq":{event.seq}{turn}'
