"""Events: the rows of the journal, appended by a flush and read from a cursor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import asyncpg
import msgspec
from msgspec import Struct

from anynode.models.database import Database

DELTA = "turn.delta"


class Event(Struct, gc=False):
    """One committed row of the journal; `payload` is a JSON object as text.

    `frame` is for whoever shows the event: what it is encoded to once serves all who follow. A node makes one for
    nearly every token, and none is ever part of a cycle: so the garbage collector need not know them.
    """

    seq: int
    type: str
    turn_id: str | None
    payload: str
    frame: str | None = None


@dataclass(slots=True)
class NewMessage:
    """A message that a turn leaves behind; `number` counts the turn's from 1, `tool_calls` is JSON."""

    id: UUID
    user_id: str
    number: int
    role: str
    content: str
    status: str
    created_at: datetime
    tool_calls: str | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


@dataclass(slots=True)
class Ending:
    """How a turn ended; committed together with its last event. `error` and `usage` are JSON."""

    status: str
    messages: Sequence[NewMessage]
    error: str | None = None
    usage: str | None = None


@dataclass(slots=True)
class Entry:
    """What one turn has to append in a flush, under the epoch that it runs in."""

    turn_id: UUID
    epoch: int
    events: Sequence[Event]
    ending: Ending | None = None


async def flush(database: Database, entries: Sequence[Entry], *, within_seconds: float) -> set[UUID]:
    """Append all entries in one statement. Returns the turns that were refused: their epoch is stale, or they have
    ended. Repeating it with the same entries is harmless. Raises Unavailable, or asyncpg.PostgresError."""
    if len(entries) == 1 and entries[0].ending is None and len(entries[0].events) == 1:
        entry, event = entries[0], entries[0].events[0]
        values = (entry.turn_id, entry.epoch, event.seq, event.type, event.payload)
        rows = await database.fetch("flush_one", *values, within_seconds=within_seconds, line="journal")
        return {row["turn_id"] for row in rows}
    ends = [(entry, entry.ending) for entry in entries if entry.ending is not None]
    arguments: list[Sequence[object]] = [
        [str(entry.turn_id) for entry in entries],
        [entry.epoch for entry in entries],
        [number for number, entry in enumerate(entries, 1) for _ in entry.events],
        [event.seq for entry in entries for event in entry.events],
        [event.type for entry in entries for event in entry.events],
        [event.payload for entry in entries for event in entry.events],
    ]
    if ends:
        said = [(entry.turn_id, message) for entry, ending in ends for message in ending.messages]
        arguments += [
            [turn_id for turn_id, _ in said],
            [message.id for _, message in said],
            [message.user_id for _, message in said],
            [message.number for _, message in said],
            [message.role for _, message in said],
            [message.content for _, message in said],
            [message.tool_calls for _, message in said],
            [message.tool_name for _, message in said],
            [message.tool_call_id for _, message in said],
            [message.status for _, message in said],
            [message.created_at for _, message in said],
            [entry.turn_id for entry, _ in ends],
            [ending.status for _, ending in ends],
            [ending.error for _, ending in ends],
            [ending.usage for _, ending in ends],
            [entry.events[-1].seq for entry, _ in ends],
        ]
    name = "flush_with_endings" if ends else "flush"
    rows = await database.fetch(name, *arguments, within_seconds=within_seconds, line="journal")
    return {row["turn_id"] for row in rows}


async def ended_under(database: Database, claims: dict[UUID, int], *, within_seconds: float) -> set[UUID]:
    """Which of the refused turns (id → epoch) have ended under that very epoch: a flush whose answer was lost had
    already committed them, so they are not lost to another node."""
    rows = await database.fetch("turn_states", list(claims), within_seconds=within_seconds, line="journal")
    return {row["id"] for row in rows if row["status"] != "running" and row["epoch"] == claims[row["id"]]}


@dataclass(slots=True)
class Reading:
    """What lies after a cursor: `events` in order without a gap, unless `is_broken`: then the journal no longer (or,
    after a failover, not yet) holds the cursor's place, and only a snapshot helps."""

    events: list[Event]
    is_broken: bool
    is_complete: bool  # nothing committed was left out for the limit
    is_running: bool  # a turn is not over yet
    has_lapsed: bool = False  # … but its lease is


async def read_events(
    database: Database, user_id: str, conversation_id: UUID, after: int, *, limit: int
) -> Reading | None:
    """At most `limit` events with a seq greater than `after`. None: not this user's conversation."""
    rows = await database.fetch("read_events", user_id, conversation_id, after, limit + 1)
    return _reading(rows, after, limit) if rows else None


async def read_running(
    database: Database, cursors: Mapping[UUID, int], *, limit: int, within_seconds: float
) -> dict[UUID, Reading]:
    """The same for many conversations (id → cursor) in one statement, whoever's they are. Raises Unavailable."""
    arguments = ([str(conversation_id) for conversation_id in cursors], list(cursors.values()), limit + 1)
    rows = await database.fetch("read_running", *arguments, within_seconds=within_seconds, line="watch")
    by_number: dict[int, list[asyncpg.Record]] = {}
    for row in rows:
        by_number.setdefault(row["number"], []).append(row)
    return {
        conversation_id: _reading(by_number[number], after, limit)
        for number, (conversation_id, after) in enumerate(cursors.items(), 1)
    }


def _reading(rows: Sequence[asyncpg.Record], after: int, limit: int) -> Reading:
    found = [row for row in rows if row["seq"] is not None]
    events = [Event(row["seq"], row["type"], row["turn_id"], row["payload"]) for row in found if row["seq"] > after]
    if events:
        is_broken = any(event.seq != seq for seq, event in enumerate(events, after + 1))
    else:
        is_broken = not found and after != rows[0]["last_seq"]
    has_lapsed = rows[0].get("has_lapsed", False)
    return Reading(events, is_broken, len(found) <= limit, rows[0]["is_running"], has_lapsed)


def delta_payload(text: str) -> str:
    """The payload of a `turn.delta`."""
    return '{"text":' + msgspec.json.encode(text).decode() + "}"


def delta_text(event: Event) -> str:
    """The text of a `turn.delta`."""
    text: str = msgspec.json.decode(event.payload)["text"]
    return text
