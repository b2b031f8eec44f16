"""Events: the rows of the journal, appended by a flush and read from a cursor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import asyncpg
import msgspec
from msgspec import Struct

from anynode.models.database import READ_BYTES_MAX, Database
from anynode.models.queries import Bound, bind

DELTA = "turn.delta"


class Event(Struct, gc=False):
    """One committed row of the journal; `payload` is a JSON object as text.

    `frame` is the event as it is sent, encoded once for all followers. A node makes one `Event` for nearly every token,
    and none is ever part of a cycle, so the garbage collector need not know them.
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
    """The end of a turn, committed together with its last event. `error` and `usage` are JSON."""

    status: str
    messages: Sequence[NewMessage]
    error: str | None = None
    usage: str | None = None
    tokens: int = 0  # read and written, for the user's limit


@dataclass(slots=True)
class Entry:
    """The events that one turn appends in a flush, under the epoch that it runs in, and its ending."""

    turn_id: UUID
    epoch: int
    events: Sequence[Event]
    ending: Ending | None = None


async def flush(database: Database, entries: Sequence[Entry], *, within_seconds: float) -> set[UUID]:
    """Append all entries in one statement. Returns the turns that were refused: their epoch is stale, or they have
    ended. Repeating it with the same entries is harmless. Raises Unavailable, or asyncpg.PostgresError."""
    rows = await database.run(_flush(entries), within_seconds=within_seconds, line="journal")
    return {row["turn_id"] for row in rows}


def _flush(entries: Sequence[Entry]) -> Bound:
    """Return the cheapest statement that appends all entries."""
    if len(entries) == 1 and entries[0].ending is None and len(entries[0].events) == 1:
        (entry,) = entries
        (event,) = entry.events
        return bind(
            "flush_one",
            turn_id=entry.turn_id,
            epoch=entry.epoch,
            seq=event.seq,
            type=event.type,
            payload=event.payload,
        )
    events: dict[str, Sequence[object]] = {
        "turn_ids": [str(entry.turn_id) for entry in entries],
        "epochs": [entry.epoch for entry in entries],
        "event_turns": [number for number, entry in enumerate(entries, 1) for _ in entry.events],
        "event_seqs": [event.seq for entry in entries for event in entry.events],
        "event_types": [event.type for entry in entries for event in entry.events],
        "event_payloads": [event.payload for entry in entries for event in entry.events],
    }
    ends = [(entry, entry.ending) for entry in entries if entry.ending is not None]
    if not ends:
        return bind("flush", **events)
    said = [(entry.turn_id, message) for entry, ending in ends for message in ending.messages]
    return bind(
        "flush_with_endings",
        **events,
        message_turn_ids=[turn_id for turn_id, _ in said],
        message_ids=[message.id for _, message in said],
        user_ids=[message.user_id for _, message in said],
        numbers=[message.number for _, message in said],
        roles=[message.role for _, message in said],
        contents=[message.content for _, message in said],
        tool_calls=[message.tool_calls for _, message in said],
        tool_names=[message.tool_name for _, message in said],
        tool_call_ids=[message.tool_call_id for _, message in said],
        message_statuses=[message.status for _, message in said],
        created_ats=[message.created_at for _, message in said],
        ended_turn_ids=[entry.turn_id for entry, _ in ends],
        statuses=[ending.status for _, ending in ends],
        errors=[ending.error for _, ending in ends],
        usages=[ending.usage for _, ending in ends],
        last_seqs=[entry.events[-1].seq for entry, _ in ends],
        tokens=[ending.tokens for _, ending in ends],
    )


async def ended_under(database: Database, claims: dict[UUID, int], *, within_seconds: float) -> set[UUID]:
    """Return which of the refused turns (id → epoch) have ended under that very epoch. They are not lost to another
    node: an earlier attempt of the flush, whose answer was lost, has committed them. Raises Unavailable."""
    states = bind("turn_states", turn_ids=list(claims))
    rows = await database.run(states, within_seconds=within_seconds, line="journal")
    return {row["id"] for row in rows if row["status"] != "running" and row["epoch"] == claims[row["id"]]}


@dataclass(slots=True)
class Reading:
    """The journal after a cursor: `events` in order without a gap, unless `is_broken`. Then the journal no longer (or,
    after a failover, not yet) holds the cursor's place, and the follower needs a snapshot."""

    events: list[Event]
    is_broken: bool
    is_complete: bool  # nothing committed was left out for the limits
    is_running: bool  # a turn is not over yet
    has_lapsed: bool = False  # … but its lease is


async def read_events(
    database: Database, user_id: str, conversation_id: UUID, after: int, *, limit: int
) -> Reading | None:
    """Read at most about `limit` events with a seq greater than `after`, up to the one whose payload fills 2 MiB. None:
    not this user's conversation.

    Raises Unavailable.
    """
    journal = bind(
        "read_events",
        user_id=user_id,
        conversation_id=conversation_id,
        cursor=after,
        events_max=limit + 1,
        bytes_max=READ_BYTES_MAX,
    )
    rows = await database.run(journal)
    return _reading(rows, after, limit) if rows else None


async def read_running(
    database: Database, cursors: Mapping[UUID, int], *, limit: int, within_seconds: float
) -> dict[UUID, Reading]:
    """Read the journals of many conversations (id → cursor), of any users, in one statement; see `read_events`.

    At most about `limit` events of each, and 2 MiB as they are stored; an event that is larger than its part of them is
    the only one, or waits for the next reading. Raises Unavailable.
    """
    journals = bind(
        "read_running",
        conversation_ids=[str(conversation_id) for conversation_id in cursors],
        cursors=list(cursors.values()),
        events_max=limit + 1,
        payload_bytes_max=READ_BYTES_MAX // (limit + 1),
    )
    rows = await database.run(journals, within_seconds=within_seconds, line="watch")
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
    is_whole = len(found) <= limit and (not found or (found[-1].get("bytes") or 0) < READ_BYTES_MAX)
    for number, event in enumerate(events):
        if event.payload is None:  # it is too large to be read with those before it
            is_whole = False
            del events[number:]
            break
    if events:
        is_broken = any(event.seq != seq for seq, event in enumerate(events, after + 1))
    else:
        is_broken = not found and after != rows[0]["last_seq"]
    has_lapsed = rows[0].get("has_lapsed", False)
    return Reading(events, is_broken, is_whole, rows[0]["is_running"], has_lapsed)


def delta_payload(text: str) -> str:
    """Return the payload of a `turn.delta` with this text."""
    return '{"text":' + msgspec.json.encode(text).decode() + "}"


def delta_text(event: Event) -> str:
    """Return the text of a `turn.delta`."""
    text: str = msgspec.json.decode(event.payload)["text"]
    return text
