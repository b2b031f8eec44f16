"""Following: one conversation's journal from a cursor, then live. The rows are the truth; a wake-up is a hint.

A follower is a cursor, not a queue: whoever is slow reads on later, from this node's memory while the turn runs
here and from Postgres otherwise, so nothing is dropped and nothing piles up.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Final, TypeAlias
from uuid import UUID

from models.conversations import Snapshot, read_snapshot
from models.database import Database
from models.events import Event, Reading, read_events
from server.errors import NotFound

EVENTS_READ_MAX: Final = 1000  # rows of one read from Postgres

Step: TypeAlias = Sequence[Event] | Snapshot


class Log:
    """The committed events of one turn that runs on this node, without a gap; `is_over` when none will follow here, and
    `over_at` then says at which of its channel's changes."""

    __slots__ = ("events", "first_seq", "is_over", "over_at")

    def __init__(self, events: Sequence[Event]) -> None:
        self.events = list(events)
        self.first_seq = self.events[0].seq
        self.is_over = False
        self.over_at = 0

    def covers(self, cursor: int) -> bool:
        """Whether what comes after the cursor is here, or will be."""
        return self.first_seq <= cursor + 1 <= self.first_seq + len(self.events)

    def after(self, cursor: int) -> list[Event]:
        """The events after a cursor that is covered."""
        return self.events[cursor + 1 - self.first_seq :]


class Channel:
    """A conversation that somebody follows here, or whose turn runs here; `changes` counts what may be news."""

    __slots__ = ("_loop", "_waiting", "changes", "followers", "log")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()  # kept: asking for it is a system call, once a token and follower
        self.log: Log | None = None
        self.followers = 0
        self.changes = 0
        self._waiting: set[asyncio.Future[None]] = set()

    def wake(self) -> None:
        """Let everybody look again."""
        self.changes += 1
        for future in self._waiting:
            if not future.done():
                future.set_result(None)

    async def change(self) -> None:
        """Wait for the next change from now on."""
        future: asyncio.Future[None] = self._loop.create_future()
        self._waiting.add(future)
        try:
            await future
        finally:
            self._waiting.discard(future)


class Follows:
    """All channels of this node."""

    def __init__(self, database: Database, *, snapshot_messages_max: int) -> None:
        self._database = database
        self._snapshot_messages_max = snapshot_messages_max
        self._channels: dict[UUID, Channel] = {}

    def start_log(self, conversation_id: UUID, events: Sequence[Event]) -> Log:
        """A turn runs here from now on; `events` are committed. Its followers are woken."""
        channel = self._channels.setdefault(conversation_id, Channel())
        channel.log = Log(events)
        channel.wake()
        return channel.log

    def extend_log(self, conversation_id: UUID, log: Log, events: Sequence[Event], *, is_over: bool) -> None:
        """More events are committed."""
        log.events.extend(events)
        if is_over:
            self.end_log(conversation_id, log)
        elif (channel := self._channels.get(conversation_id)) is not None:
            channel.wake()

    def end_log(self, conversation_id: UUID, log: Log) -> None:
        """The turn is over, or no longer this node's. Followers that are behind keep the log until they are done."""
        if log.is_over:
            return
        log.is_over = True
        channel = self._channels.get(conversation_id)
        if channel is not None:
            if channel.log is log:
                channel.log = None
            channel.wake()
            log.over_at = channel.changes
            self._drop_if_unused(conversation_id, channel)

    async def follow(
        self, user_id: str, conversation_id: UUID, after: int | None, *, is_own: bool = False
    ) -> AsyncGenerator[Step, None]:
        """Everything after the cursor, in order, for ever: batches of events, and a snapshot where there is no cursor
        or the journal does not hold what follows it. `is_own` says that the conversation is known to be the user's.
        Raises NotFound, or Unavailable (then follow again)."""
        channel = self._channels.setdefault(conversation_id, Channel())
        channel.followers += 1
        log: Log | None = None  # where this follower reads while the turn runs, or ran, here
        read_at = -1  # at which of the channel's changes all that was committed had been read
        try:
            if after is None:
                snapshot = await self._snapshot(user_id, conversation_id)
                after, is_own = snapshot.seq, True
                yield snapshot
            while True:
                if log is None and is_own and channel.log is not None and channel.log.covers(after):
                    log = channel.log
                if log is not None:
                    if events := log.after(after):
                        after = events[-1].seq
                        yield events
                    elif log.is_over:
                        read_at = log.over_at
                        log = None
                    else:
                        await channel.change()
                elif read_at == channel.changes:
                    await channel.change()
                else:
                    changes = channel.changes  # what commits during the reading is not known to be in it
                    reading = await self._read(user_id, conversation_id, after)
                    is_own = True
                    if reading.is_broken:
                        snapshot = await self._snapshot(user_id, conversation_id)
                        after = snapshot.seq
                        yield snapshot
                        continue
                    if reading.is_complete:
                        read_at = changes
                    if reading.events:
                        after = reading.events[-1].seq
                        yield reading.events
        finally:
            channel.followers -= 1
            self._drop_if_unused(conversation_id, channel)

    async def _read(self, user_id: str, conversation_id: UUID, after: int) -> Reading:
        reading = await read_events(self._database, user_id, conversation_id, after, limit=EVENTS_READ_MAX)
        if reading is None:
            raise NotFound(conversation_id=conversation_id)
        return reading

    async def _snapshot(self, user_id: str, conversation_id: UUID) -> Snapshot:
        snapshot = await read_snapshot(
            self._database, user_id, conversation_id, messages_max=self._snapshot_messages_max
        )
        if snapshot is None:
            raise NotFound(conversation_id=conversation_id)
        return snapshot

    def _drop_if_unused(self, conversation_id: UUID, channel: Channel) -> None:
        if channel.followers == 0 and channel.log is None and self._channels.get(conversation_id) is channel:
            del self._channels[conversation_id]
