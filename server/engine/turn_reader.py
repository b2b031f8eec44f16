"""The reader of one turn: every API that shows a turn reads it here, from the journal or as it is stored.

The journal is what counts while it holds the turn. The stored turn makes other events than the journal does: each
message comes as one delta. So it may stand in for the journal only where nothing of the turn has been shown, and only
where it is whole:

    first_seq   the journal               shown so far   from the start   stored as    the turn is read from
    a seq       holds the turn            -              -                -            the journal
    a seq       does not hold it          nothing        yes              ended        the stored turn
    a seq       does not hold it          nothing        yes              running      nowhere: TurnInterrupted
    a seq       does not hold it          nothing        no               -            nowhere: TurnInterrupted
    a seq       loses it on the way       something      -                -            nowhere: TurnInterrupted
    None        has deleted it            -              -                ended        the stored turn
    None        has deleted it            -              -                running      nowhere: TurnInterrupted

A stored turn that runs although its events are gone has lost its end with a failover of Postgres, and runs again.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Final

import msgspec

from anynode.models.conversations import Snapshot
from anynode.models.database import Database
from anynode.models.events import Event, read_events
from anynode.models.rules import RUNNING
from anynode.models.turns import TurnRef, read_turn
from anynode.server.engine.follow import EVENTS_READ_MAX, Follows
from anynode.server.engine.postgres_errors import unavailable_as_client_error
from anynode.server.engine.turn_events import events_of_stored, is_end
from anynode.server.errors import ConversationBusy, DatabaseUnavailable, NotFound
from anynode.server.protocol.bodies import StoredTurn
from anynode.server.protocol.encoding import message_of, usage_of
from anynode.server.protocol.frames import ErrorDetail

__all__ = ["Event", "TurnInterrupted", "TurnReader", "TurnRef"]

logger = logging.getLogger("anynode.follow")

_ERROR: Final = msgspec.json.Decoder(ErrorDetail)


class JournalGone(Exception):
    """The journal does not hold the turn's events, or not all of them."""


class TurnInterrupted(ConversationBusy):
    """The turn cannot be shown to its end from here; it is running again."""


class TurnReader:
    """Reads the turns of users who are known to own them."""

    def __init__(self, database: Database, follows: Follows) -> None:
        self._database = database
        self._follows = follows

    async def stored(self, turn: TurnRef) -> StoredTurn:
        """Return a turn as it is stored. Raises NotFound or DatabaseUnavailable."""
        with unavailable_as_client_error():
            rows = await read_turn(self._database, turn.user_id, turn.conversation_id, turn.turn_id)
        if rows is None:
            raise NotFound("There is no such turn.")
        row = rows[0]
        return StoredTurn(
            conversation_id=turn.conversation_id,
            turn_id=turn.turn_id,
            status=row["status"],
            usage=usage_of(row["usage"]),
            error=None if row["error"] is None else _ERROR.decode(row["error"]),
            created_at=row["started_at"],
            finished_at=row["finished_at"],
            messages=[
                message_of({**row, "status": row["message_status"], "turn_id": turn.turn_id})
                for row in rows
                if row["id"] is not None
            ],
        )

    async def wait_end(self, turn: TurnRef) -> None:
        """Wait until the turn has ended, also while Postgres is away. Raises NotFound where its conversation is deleted
        meanwhile."""
        if turn.first_seq is None:
            return
        try:
            async with aclosing(self._journalled(turn, turn.first_seq)) as batches:
                async for _ in batches:
                    pass
        except JournalGone:
            pass  # the journal of a turn is deleted after its end

    async def events(
        self, turn: TurnRef, *, is_whole: bool, catches_up: bool = False
    ) -> AsyncGenerator[Sequence[Event], None]:
        """Yield all events of a turn in order, in batches, up to its end, also while Postgres is away.

        `is_whole` says that the turn is shown from its start. With `catches_up` the first batch is all that is
        committed by now. Raises TurnInterrupted where neither the journal nor the stored turn can show it (see
        the table above), NotFound where its conversation is deleted, and DatabaseUnavailable where Postgres is away
        before the first batch.
        """
        has_shown = False
        if turn.first_seq is not None:
            try:
                next_seq = turn.first_seq
                if catches_up and (events := await self._committed(turn, next_seq)):
                    has_shown = True
                    yield events
                    if is_end(events[-1]):
                        return
                    next_seq = events[-1].seq + 1
                events = ()
                async with aclosing(self._journalled(turn, next_seq)) as batches:
                    async for batch in batches:
                        has_shown = True
                        yield batch
                        del batch
                return
            except JournalGone:
                if has_shown or not is_whole:
                    raise TurnInterrupted from None
        stored = await self.stored(turn)
        if stored.status == RUNNING:
            raise TurnInterrupted
        yield events_of_stored(stored)

    async def _journalled(self, turn: TurnRef, next_seq: int) -> AsyncGenerator[Sequence[Event], None]:
        """Follow the turn from the event with this seq to its end. Raises JournalGone or NotFound."""
        wanted = str(turn.turn_id)
        updates = self._follows.keep_following(turn.user_id, turn.conversation_id, next_seq - 1, is_own=True)
        async with aclosing(updates):
            async for update in updates:
                if isinstance(update, DatabaseUnavailable):
                    logger.warning("turn %s is followed on when Postgres is back: %s", turn.turn_id, update.__cause__)
                elif isinstance(update, Snapshot):
                    raise JournalGone
                elif events := [event for event in update if event.turn_id == wanted]:
                    yield events
                    if is_end(events[-1]):
                        return
                    del events
                del update

    async def _committed(self, turn: TurnRef, next_seq: int) -> Sequence[Event]:
        """Return the events that are committed by now. Raises JournalGone, NotFound or DatabaseUnavailable."""
        wanted = str(turn.turn_id)
        events: list[Event] = []
        after = next_seq - 1
        while True:
            with unavailable_as_client_error():
                reading = await read_events(
                    self._database, turn.user_id, turn.conversation_id, after, limit=EVENTS_READ_MAX
                )
            if reading is None:
                raise NotFound(conversation_id=turn.conversation_id)
            if reading.is_broken:
                raise JournalGone
            events += [event for event in reading.events if event.turn_id == wanted]
            if reading.is_complete or (events and is_end(events[-1])):
                return events
            after = reading.events[-1].seq
