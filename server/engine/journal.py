"""The journal's group commit: what the running turns of this node say goes to Postgres in one statement a flush.

The contract. While a turn runs, only its owner appends to its conversation, and counts `seq` on from the
admission. `TurnJournal.add_*` never waits: it puts into a buffer, whose size is bounded by the turn's own bound.
A flush takes the whole buffer; the next batch collects while it is under way; there is never more than one.
Nothing is published before its commit is known. A flush whose outcome is unknown is repeated with the same
keys. A turn whose epoch is stale is refused as a whole: it is lost, says nothing more, and nobody here is told
anything further of it by this node's memory; its followers read on in Postgres.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final
from uuid import UUID

from anynode.models.database import Database, Unavailable
from anynode.models.events import DELTA, Ending, Entry, Event, delta_payload, ended_under, flush
from anynode.server import metrics

logger = logging.getLogger("anynode.journal")

# From so many running turns on, what is urgent keeps the full interval's distance from the previous flush; with
# fewer, a proportion of it. So urgency costs nothing alone and cannot raise the number of statements in a crowd.
URGENT_TURNS: Final = 100

OnCommitted = Callable[[Sequence[Event], bool], None]


class TurnJournal:
    """One running turn's way into the journal; `closed` is done when its ending is committed (True) or it is lost."""

    __slots__ = (
        "_committed_seq",
        "_ending",
        "_is_dirty",
        "_is_sealed",
        "_journal",
        "_next_seq",
        "_on_committed",
        "_pending",
        "_progress",
        "_texts",
        "_turn_id_text",
        "closed",
        "epoch",
        "turn_id",
    )

    def __init__(self, journal: Journal, turn_id: UUID, epoch: int, next_seq: int, on_committed: OnCommitted) -> None:
        self.turn_id = turn_id
        self._turn_id_text = str(turn_id)
        self.epoch = epoch
        self.closed: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._journal = journal
        self._next_seq = next_seq
        self._committed_seq = next_seq - 1
        self._progress: asyncio.Future[None] | None = None  # done at the next commit, or when the turn is over
        self._on_committed = on_committed
        self._pending: list[tuple[str, str]] = []
        self._texts: list[str] = []
        self._ending: Ending | None = None
        self._is_dirty = False
        self._is_sealed = False

    def add_text(self, text: str, *, is_urgent: bool = False) -> None:
        """Append text; adjacent texts of one flush become one event. Ignored once the turn has ended or is lost."""
        if self._is_sealed:
            return
        self._texts.append(text)
        if is_urgent or not self._is_dirty:
            self._journal.want_flush(self, is_urgent=is_urgent)

    def add_event(self, type: str, payload: str) -> None:
        """Append an event with a JSON payload, to be committed at once. Ignored once the turn has ended or is lost."""
        if self._is_sealed:
            return
        self._close_text()
        self._pending.append((type, payload))
        self._journal.want_flush(self, is_urgent=True)

    async def committed(self) -> None:
        """Wait until all that was appended so far is committed, or the turn is over or lost. The one thing here that
        waits: for an agent that is about to do what must not be done without a trace."""
        self._close_text()
        last_seq = self._next_seq - 1 + len(self._pending)
        while self._committed_seq < last_seq and not self.closed.done():
            self._progress = asyncio.get_running_loop().create_future()
            await self._progress

    def end(self, type: str, payload: str, ending: Ending) -> None:
        """Append the turn's last event, which commits with its messages and status. Only the first one counts."""
        if self._is_sealed:
            return
        self.add_event(type, payload)
        self._ending = ending
        self._is_sealed = True

    def lose(self) -> None:
        """This node no longer has the right to the turn: forget what is not committed, say nothing more."""
        self._is_sealed = True
        self._pending.clear()
        self._texts.clear()
        if not self.closed.done():
            self.closed.set_result(False)
        self._tell_progress()

    @property
    def is_ending(self) -> bool:
        """Whether the last event is in the buffer, or on its way into Postgres."""
        return self._ending is not None

    @property
    def is_lost(self) -> bool:
        """Whether the turn is no longer this node's."""
        return self.closed.done() and not self.closed.result()

    def _close_text(self) -> None:
        if self._texts:
            self._pending.append((DELTA, delta_payload("".join(self._texts))))
            self._texts.clear()

    def _take(self) -> Entry:
        self._close_text()
        events = []
        for seq, (type, payload) in enumerate(self._pending, self._next_seq):
            events.append(Event(seq, type, self._turn_id_text, payload))
        self._next_seq += len(events)
        self._pending.clear()
        self._is_dirty = False
        return Entry(self.turn_id, self.epoch, events, self._ending)

    def _commit(self, entry: Entry) -> None:
        if self.is_lost:
            return
        self._on_committed(entry.events, entry.ending is not None)
        self._committed_seq = entry.events[-1].seq
        if entry.ending is not None:
            self.closed.set_result(True)
        self._tell_progress()

    def _tell_progress(self) -> None:
        if self._progress is not None and not self._progress.done():
            self._progress.set_result(None)


class Journal:
    """The buffer of a node and the one task that flushes it."""

    def __init__(self, database: Database, *, flush_interval_seconds: float, attempt_seconds: float) -> None:
        self._database = database
        self._interval = flush_interval_seconds
        self._attempt_seconds = attempt_seconds  # then another connection is tried
        self._loop = asyncio.get_running_loop()
        self._dirty: list[TurnJournal] = []
        self._open = 0
        self._due = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._flushed_at = self._loop.time() - flush_interval_seconds

    def open(self, turn_id: UUID, epoch: int, next_seq: int, on_committed: OnCommitted) -> TurnJournal:
        """The journal of a turn that runs here from now on; `next_seq` is the seq of its next event. The callback
        gets events once they are committed, and whether they end the turn."""
        turn = TurnJournal(self, turn_id, epoch, next_seq, on_committed)
        self._open += 1
        turn.closed.add_done_callback(self._forget)
        return turn

    def want_flush(self, turn: TurnJournal, *, is_urgent: bool) -> None:
        """See that what the turn has to say is committed within the interval, or as soon as is fair."""
        if not turn._is_dirty:
            turn._is_dirty = True
            self._dirty.append(turn)
        if is_urgent:
            at = self._flushed_at + self._interval * min(1.0, self._open / URGENT_TURNS)
        else:
            at = self._loop.time() + self._interval
        if self._timer is not None:
            if self._timer_at <= at:
                return
            self._timer.cancel()
        if at <= self._loop.time():
            self._timer = None
            self._due.set()
        else:
            self._timer, self._timer_at = self._loop.call_at(at, self._ring), at

    async def run(self) -> None:
        """Flush for ever. The owner cancels it when no turn runs any more."""
        while True:
            await self._due.wait()
            self._due.clear()
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            turns, self._dirty = self._dirty, []
            if not turns:
                continue
            self._flushed_at = self._loop.time()
            batch = [(turn, turn._take()) for turn in turns]
            await self._commit([(turn, entry) for turn, entry in batch if entry.events])
            if self._dirty and self._timer is None:
                self._ring()

    def _ring(self) -> None:
        self._timer = None
        self._due.set()

    def _forget(self, closed: asyncio.Future[bool]) -> None:
        self._open -= 1

    async def _commit(self, batch: Sequence[tuple[TurnJournal, Entry]]) -> None:
        while batch := [(turn, entry) for turn, entry in batch if not turn.is_lost]:
            entries = [entry for _, entry in batch]
            try:
                refused = await flush(self._database, entries, within_seconds=self._attempt_seconds)
                if refused:
                    claims = {entry.turn_id: entry.epoch for entry in entries if entry.turn_id in refused}
                    refused -= await ended_under(self._database, claims, within_seconds=self._attempt_seconds)
            except Unavailable as error:
                # A turn leaves the batch when its lease has run out by this node's own clock.
                logger.warning("a flush of %d turns waits for Postgres: %s", len(batch), error)
                continue
            except Exception:  # noqa: BLE001  (logged where it is found whose it is)
                await self._isolate(batch)
                return
            metrics.flushes.inc()
            metrics.events.inc(sum(len(entry.events) for entry in entries))
            for turn, entry in batch:
                if entry.turn_id in refused:
                    logger.warning("turn %s is no longer this node's", turn.turn_id)
                    turn.lose()
                else:
                    turn._commit(entry)
            return

    async def _isolate(self, batch: Sequence[tuple[TurnJournal, Entry]]) -> None:
        """One turn has something that Postgres does not take: find it, so that the others go on."""
        if len(batch) > 1:
            for part in batch:
                await self._commit([part])
        else:
            logger.exception("what turn %s said cannot be committed", batch[0][0].turn_id)
            batch[0][0].lose()
