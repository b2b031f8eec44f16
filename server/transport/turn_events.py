"""The events of one turn, for those who show nothing else: from its first one to its end."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from uuid import UUID

import msgspec

from anynode.models.conversations import Snapshot
from anynode.models.database import Database, Unavailable
from anynode.models.events import DELTA, Event, delta_payload, read_events
from anynode.models.rules import FAILED, RUNNING, TERMINAL_EVENTS
from anynode.server.engine.follow import EVENTS_READ_MAX, Follows
from anynode.server.errors import NotFound
from anynode.server.protocol.bodies import StoredTurn
from anynode.server.protocol.encoding import encode

logger = logging.getLogger("anynode.follow")

_TERMINAL = frozenset(TERMINAL_EVENTS.values())


class JournalGone(Exception):
    """The journal does not hold the turn's events, or not all of them."""


async def events_of_turn(
    follows: Follows, user_id: str, conversation_id: UUID, turn_id: UUID, first_seq: int
) -> AsyncGenerator[Sequence[Event], None]:
    """All of the turn's events in order, in batches, up to its end, also while Postgres is away. Raises JournalGone, or
    NotFound where the conversation is deleted."""
    wanted = str(turn_id)
    after = first_seq - 1
    while True:
        try:
            async with aclosing(follows.follow(user_id, conversation_id, after, is_own=True)) as steps:
                async for step in steps:
                    if isinstance(step, Snapshot):
                        raise JournalGone
                    after = step[-1].seq
                    if events := [event for event in step if event.turn_id == wanted]:
                        yield events
                        if events[-1].type in _TERMINAL:
                            return
        except Unavailable as error:
            logger.warning("turn %s is followed on when Postgres is back: %s", turn_id, error)


async def events_so_far(
    database: Database, user_id: str, conversation_id: UUID, turn_id: UUID, first_seq: int
) -> Sequence[Event] | None:
    """The turn's events that are committed by now. None: the journal does not hold them. Raises NotFound or
    Unavailable."""
    wanted = str(turn_id)
    events: list[Event] = []
    after = first_seq - 1
    while True:
        reading = await read_events(database, user_id, conversation_id, after, limit=EVENTS_READ_MAX)
        if reading is None:
            raise NotFound(conversation_id=conversation_id)
        if reading.is_broken:
            return None
        events += [event for event in reading.events if event.turn_id == wanted]
        if reading.is_complete or (events and events[-1].type in _TERMINAL):
            return events
        after = reading.events[-1].seq


def events_of_stored(turn: StoredTurn) -> list[Event]:
    """Events that show a turn as it is stored, where its own have been deleted: each message is one delta."""
    said: list[tuple[str, str]] = [("turn.started", "{}")]
    for message in turn.messages:
        if message.role == "tool":
            answered = {
                "tool_call_id": message.tool_call_id,
                "tool_name": message.tool_name,
                "content": message.content,
                "is_error": message.status == FAILED,
            }
            said.append(("turn.tool_result", encode(answered)))
            continue
        if message.content:
            said.append((DELTA, delta_payload(message.content)))
        for call in msgspec.to_builtins(message.tool_calls) or ():
            function = call["function"]
            arguments = msgspec.Raw(function["arguments"].encode())
            made = {"tool_call_id": call["id"], "tool_name": function["name"], "arguments": arguments}
            said.append(("turn.tool_call", encode(made)))
    if turn.status != RUNNING:
        at = turn.messages[-1].created_at if turn.messages else turn.finished_at
        ending = {"message": {"created_at": at}, "usage": turn.usage, "error": turn.error}
        said.append((TERMINAL_EVENTS[turn.status], encode(ending)))
    return [Event(seq, type, str(turn.turn_id), payload) for seq, (type, payload) in enumerate(said)]
