"""Group commit: one statement per flush appends what all running turns of this node have said.

The contract:

- While a turn runs, only its owner appends to its conversation. It counts `seq` on from the admission.
- `TurnJournal.add_text` and `add_event` never wait. They fill a buffer whose size the turn's own limit bounds.
- A flush takes the whole buffer, and the next batch collects while it is under way. There is never more than one flush.
- Nothing is published before its commit is known. A flush whose outcome is unknown is repeated with the same keys.
- Postgres refuses a turn whose epoch is stale, as a whole. That turn is lost: this node appends and publishes nothing
  more of it, and its followers continue from Postgres.

`FlushSchedule` and `TurnBuffer` decide; they are given the time and know no event loop. `Journal` and `TurnJournal`
act.
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
from anynode.server.engine.postgres_errors import warn_of_wait

logger = logging.getLogger("anynode.journal")

URGENT_TURNS: Final = 100  # running turns from which on urgency no longer shortens the interval

OnCommitted = Callable[[Sequence[Event], bool], None]


class FlushSchedule:
    """When the next flush is due. It is given the time and sets no timer.

    Text waits for the interval. An urgent flush comes no sooner than `interval × min(1, open_turns / URGENT_TURNS)`
    after the last one: almost at once for one turn, a full interval from 100 turns on. So urgency never adds statements
    under load.
    """

    __slots__ = ("_flushed_at", "_interval", "due_at", "open_turns")

    def __init__(self, interval_seconds: float, now: float) -> None:
        self.due_at: float | None = None  # None: nobody has asked since the last flush began
        self.open_turns = 0
        self._interval = interval_seconds
        self._flushed_at = now - interval_seconds

    def want(self, now: float, *, is_urgent: bool) -> float | None:
        """Ask for a flush. Return when it is due, or None if the next one is due as early already."""
        if is_urgent:
            at = self._flushed_at + self._interval * min(1.0, self.open_turns / URGENT_TURNS)
        else:
            at = now + self._interval
        if self.due_at is not None and self.due_at <= at:
            return None
        self.due_at = at
        return at

    def flushed(self, now: float) -> None:
        """Note that a flush begins now, with everything that was asked for so far."""
        self.due_at = None
        self._flushed_at = now


class TurnBuffer:
    """What one turn has said and no flush has taken yet, as plain state.

    The buffer accepts until the turn's ending is in it, or until the turn is lost.
    """

    __slots__ = (
        "_ending",
        "_next_seq",
        "_pending",
        "_texts",
        "_turn_id_text",
        "committed_seq",
        "epoch",
        "is_lost",
        "is_over",
        "is_sealed",
        "turn_id",
    )

    def __init__(self, turn_id: UUID, epoch: int, next_seq: int) -> None:
        self.turn_id = turn_id
        self.epoch = epoch
        self.committed_seq = next_seq - 1
        self.is_sealed = False  # nothing more is accepted
        self.is_over = False  # the ending is committed
        self.is_lost = False  # the turn is no longer this node's
        self._turn_id_text = str(turn_id)
        self._next_seq = next_seq
        self._pending: list[tuple[str, str]] = []
        self._texts: list[str] = []
        self._ending: Ending | None = None

    def add_text(self, text: str) -> None:
        """Append text. Adjacent texts of one flush become one event."""
        if not self.is_sealed:
            self._texts.append(text)

    def add_event(self, type: str, payload: str) -> None:
        """Append an event with a JSON payload."""
        if not self.is_sealed:
            self.close_text()
            self._pending.append((type, payload))

    def end(self, type: str, payload: str, ending: Ending) -> None:
        """Append the turn's last event. Only the first call counts."""
        if not self.is_sealed:
            self.add_event(type, payload)
            self._ending = ending
            self.is_sealed = True

    def lose(self) -> None:
        """Forget what no flush has taken, and accept nothing more."""
        self.is_sealed = True
        self.is_lost = not self.is_over
        self._pending.clear()
        self._texts.clear()

    def close_text(self) -> int:
        """Let later text begin another event. Return the seq of the last event that was appended so far."""
        if self._texts:
            self._pending.append((DELTA, delta_payload("".join(self._texts))))
            self._texts.clear()
        return self._next_seq - 1 + len(self._pending)

    def take(self) -> Entry:
        """Return everything for a flush, numbered, and leave the buffer empty."""
        self.close_text()
        events = []
        for seq, (type, payload) in enumerate(self._pending, self._next_seq):
            events.append(Event(seq, type, self._turn_id_text, payload))
        self._next_seq += len(events)
        self._pending.clear()
        return Entry(self.turn_id, self.epoch, events, self._ending)

    def commit(self, entry: Entry) -> None:
        """Note that an entry of this buffer is committed."""
        self.committed_seq = entry.events[-1].seq
        self.is_over = entry.ending is not None

    @property
    def is_ending(self) -> bool:
        """Whether the turn's last event was appended."""
        return self._ending is not None


class TurnJournal:
    """One running turn's way into the journal.

    `closed` is done when the turn's ending is committed (True) or the turn is lost (False).
    """

    __slots__ = ("_buffer", "_journal", "_loop", "_on_committed", "_progress", "closed", "is_queued")

    def __init__(self, journal: Journal, buffer: TurnBuffer, on_committed: OnCommitted) -> None:
        self._loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[bool] = self._loop.create_future()
        self.is_queued = False  # the next flush will take what the buffer holds
        self._journal = journal
        self._buffer = buffer
        self._progress: asyncio.Future[None] | None = None  # done at the next commit, or when the turn is closed
        self._on_committed = on_committed

    @property
    def turn_id(self) -> UUID:
        """The turn's id."""
        return self._buffer.turn_id

    @property
    def epoch(self) -> int:
        """The epoch under which this node owns the turn."""
        return self._buffer.epoch

    @property
    def is_ending(self) -> bool:
        """Whether the last event is in the buffer, on its way into Postgres, or committed."""
        return self._buffer.is_ending

    @property
    def is_lost(self) -> bool:
        """Whether the turn is no longer this node's."""
        return self._buffer.is_lost

    def add_text(self, text: str, *, is_urgent: bool = False) -> None:
        """Append text. It is ignored once the turn has ended or is lost."""
        if self._buffer.is_sealed:
            return
        self._buffer.add_text(text)
        if is_urgent or not self.is_queued:
            self._journal.want_flush(self, is_urgent=is_urgent)

    def add_event(self, type: str, payload: str) -> None:
        """Append an event with a JSON payload, urgently. It is ignored once the turn has ended or is lost."""
        if self._buffer.is_sealed:
            return
        self._buffer.add_event(type, payload)
        self._journal.want_flush(self, is_urgent=True)

    def end(self, type: str, payload: str, ending: Ending) -> None:
        """Append the turn's last event, which commits with its messages and status. Only the first call counts."""
        if self._buffer.is_sealed:
            return
        self._buffer.end(type, payload, ending)
        self._journal.want_flush(self, is_urgent=True)

    async def wait_committed(self) -> None:
        """Wait until everything appended so far is committed, or the turn is over or lost.

        An agent waits here before it does what must leave a trace: before it runs a tool.
        """
        last_seq = self._buffer.close_text()
        while self._buffer.committed_seq < last_seq and not self.closed.done():
            self._progress = self._loop.create_future()
            await self._progress

    def lose(self) -> None:
        """Give the turn up: forget what is not committed, and append and publish nothing more."""
        self._buffer.lose()
        if not self.closed.done():
            self.closed.set_result(False)
        self._tell_progress()

    def take(self) -> Entry:
        """Return everything for a flush."""
        self.is_queued = False
        return self._buffer.take()

    def commit(self, entry: Entry) -> None:
        """Publish an entry that is committed, unless the turn was lost meanwhile."""
        if self._buffer.is_lost:
            return
        is_over = entry.ending is not None
        self._on_committed(entry.events, is_over)
        self._buffer.commit(entry)
        if is_over:
            self.closed.set_result(True)
        self._tell_progress()

    def _tell_progress(self) -> None:
        if self._progress is not None and not self._progress.done():
            self._progress.set_result(None)


class Journal:
    """The turns of a node that have something to commit, and the one task that flushes them."""

    def __init__(self, database: Database, *, flush_interval_seconds: float, attempt_seconds: float) -> None:
        self._database = database
        self._attempt_seconds = attempt_seconds  # then another connection is tried
        self._loop = asyncio.get_running_loop()
        self._schedule = FlushSchedule(flush_interval_seconds, self._loop.time())
        self._queued: list[TurnJournal] = []
        self._due = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None

    def open(self, turn_id: UUID, epoch: int, next_seq: int, on_committed: OnCommitted) -> TurnJournal:
        """Return the journal of a turn that runs here from now on; `next_seq` is the seq of its next event.

        `on_committed` is called with events once they are committed, and with whether they end the turn.
        """
        turn = TurnJournal(self, TurnBuffer(turn_id, epoch, next_seq), on_committed)
        self._schedule.open_turns += 1
        turn.closed.add_done_callback(self._forget)
        return turn

    def want_flush(self, turn: TurnJournal, *, is_urgent: bool) -> None:
        """Let the next flush take what the turn has said: within the interval, or as soon as the schedule allows."""
        if not turn.is_queued:
            turn.is_queued = True
            self._queued.append(turn)
        now = self._loop.time()
        at = self._schedule.want(now, is_urgent=is_urgent)
        if at is None:
            return
        self._stop_timer()
        if at <= now:
            self._due.set()
        else:
            self._timer = self._loop.call_at(at, self._due.set)

    async def run(self) -> None:
        """Flush for ever. The owner cancels this when no turn runs any more."""
        while True:
            await self._due.wait()
            self._due.clear()
            self._stop_timer()
            self._schedule.flushed(self._loop.time())
            turns, self._queued = self._queued, []
            batch = [(turn, turn.take()) for turn in turns]
            await self._commit([(turn, entry) for turn, entry in batch if entry.events])

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _forget(self, closed: asyncio.Future[bool]) -> None:
        self._schedule.open_turns -= 1

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
                warn_of_wait(logger, f"a flush of {len(batch)} turns waits", error)
                continue
            except Exception:  # noqa: BLE001  (logged once the turn that causes it is found)
                await self._isolate(batch)
                return
            metrics.flushes.inc()
            metrics.events.inc(sum(len(entry.events) for entry in entries))
            for turn, entry in batch:
                if entry.turn_id in refused:
                    logger.warning("turn %s is no longer this node's", turn.turn_id)
                    turn.lose()
                else:
                    turn.commit(entry)
            return

    async def _isolate(self, batch: Sequence[tuple[TurnJournal, Entry]]) -> None:
        """Commit each turn alone: one of them has an event that Postgres refuses, and the others must go on."""
        if len(batch) > 1:
            for part in batch:
                await self._commit([part])
        else:
            logger.exception("an event of turn %s cannot be committed; the turn is given up", batch[0][0].turn_id)
            batch[0][0].lose()
