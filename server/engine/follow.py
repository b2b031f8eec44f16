"""Following: one conversation's journal from a cursor, then live. The rows are the truth; a wake-up is a hint.

A follower is a cursor, not a queue: whoever is slow reads on later, so nothing is dropped and nothing piles up. While a
turn runs, its followers on a node share one log: what this node has committed, where the turn runs here, and otherwise
what one statement reads for all conversations whose turns run elsewhere. Whoever is behind the log reads Postgres
until he has come up with it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Final, TypeAlias
from uuid import UUID

from anynode.models.conversations import Snapshot, read_snapshot
from anynode.models.database import Database, Unavailable
from anynode.models.events import Event, Reading, read_events, read_running
from anynode.models.rules import TERMINAL_EVENTS
from anynode.server.errors import DatabaseUnavailable, NotFound

logger = logging.getLogger("anynode.follow")

EVENTS_READ_MAX: Final = 1000  # rows of one read from Postgres, for each conversation
READ_SECONDS: Final = 0.05  # from one reading of the turns that run elsewhere to the next
READ_TIMEOUT_SECONDS: Final = 2.0

Step: TypeAlias = Sequence[Event] | Snapshot

_TERMINAL: Final = frozenset(TERMINAL_EVENTS.values())


class Log:
    """The committed events of a turn from `first_seq` on, without a gap; `is_over` when none will follow here.
    `over_at` then says at which of its channel's changes, if all that was committed is here."""

    __slots__ = ("events", "first_seq", "is_doubtful", "is_over", "over_at")

    def __init__(self, first_seq: int, events: Sequence[Event] = ()) -> None:
        self.events = list(events)
        self.first_seq = first_seq
        self.is_over = False
        self.is_doubtful = False  # something may have been missed since it began
        self.over_at = -1

    @property
    def last_seq(self) -> int:
        """The seq of the last event that is here, or that came before the first."""
        return self.first_seq + len(self.events) - 1

    def covers(self, cursor: int) -> bool:
        """Whether what comes after the cursor is here, or will be."""
        return self.first_seq - 1 <= cursor <= self.last_seq

    def after(self, cursor: int) -> list[Event]:
        """The events after a cursor that is covered."""
        return self.events[cursor + 1 - self.first_seq :]


class Channel:
    """A conversation that somebody follows here, or whose turn runs here; `changes` counts what may be news.
    What is committed up to `heard_seq` is no news: whoever has not seen it is on the way."""

    __slots__ = ("_loop", "_waiting", "changes", "followers", "heard_seq", "log", "readings")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()  # kept: asking for it is a system call, once a token and follower
        self.log: Log | None = None
        self.followers = 0
        self.changes = 0
        self.heard_seq = 0
        self.readings: dict[tuple[str, int, int], asyncio.Task[Reading | None]] = {}
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
        self._remote: dict[UUID, Log] = {}  # the logs of turns that run on other nodes
        self._has_remote = asyncio.Event()

    # Turns that run here.

    def start_log(self, conversation_id: UUID, events: Sequence[Event]) -> Log:
        """A turn runs here from now on; `events` are committed. Its followers are woken."""
        channel = self._channels.setdefault(conversation_id, Channel())
        if (remote := self._remote.pop(conversation_id, None)) is not None:
            remote.is_over = True
        channel.log = Log(events[0].seq, events)
        channel.wake()
        return channel.log

    def extend_log(self, conversation_id: UUID, log: Log, events: Sequence[Event], *, is_over: bool) -> None:
        """More events are committed."""
        log.events.extend(events)
        if is_over:
            self.end_log(conversation_id, log)
        elif (channel := self._channels.get(conversation_id)) is not None:
            channel.wake()

    def end_log(self, conversation_id: UUID, log: Log, *, is_whole: bool = True) -> None:
        """The turn is over; or it is no longer this node's, and the log is not the whole of it. Followers that are
        behind keep the log until they are done."""
        if log.is_over:
            return
        log.is_over = True
        if self._remote.get(conversation_id) is log:
            del self._remote[conversation_id]
        channel = self._channels.get(conversation_id)
        if channel is None:
            return
        if channel.log is log:
            channel.log = None
        channel.wake()
        if is_whole:
            if channel.heard_seq <= log.last_seq and not log.is_doubtful:  # else the next turn may have begun already
                log.over_at = channel.changes
            channel.heard_seq = max(channel.heard_seq, log.last_seq)
        self._drop_if_unused(conversation_id, channel)

    # Turns that run on other nodes.

    def hear(self, begun: Mapping[UUID, int]) -> None:
        """Turns have begun somewhere, in conversations (id → last seq) that may be followed here."""
        for conversation_id, last_seq in begun.items():
            channel = self._channels.get(conversation_id)
            if channel is not None and last_seq > channel.heard_seq:
                channel.heard_seq = last_seq
                channel.wake()

    def wake(self, conversation_id: UUID) -> None:
        """Let those who follow it here look again."""
        if (channel := self._channels.get(conversation_id)) is not None:
            channel.wake()

    def look_again(self) -> None:
        """Anything may have happened in the meantime, also that Postgres has lost something."""
        for channel in self._channels.values():
            channel.heard_seq = 0
            if channel.log is not None:
                channel.log.is_doubtful = True
            channel.wake()

    async def read_remote(self, on_lapsed: Callable[[], object]) -> None:
        """Read what other nodes commit, for ever; `on_lapsed` is told of a turn whose node has lost its lease."""
        now = asyncio.get_running_loop().time
        while True:
            await self._has_remote.wait()
            if not self._remote:
                self._has_remote.clear()
                continue
            started = now()
            logs = dict(self._remote)
            try:
                readings = await read_running(
                    self._database,
                    {conversation_id: log.last_seq for conversation_id, log in logs.items()},
                    limit=EVENTS_READ_MAX,
                    within_seconds=READ_TIMEOUT_SECONDS,
                )
            except Exception as error:
                if not isinstance(error, Unavailable):
                    logger.exception("the turns of other nodes could not be read")
                for conversation_id, log in logs.items():
                    # Its followers read by themselves, and tell their clients what is wrong.
                    self.end_log(conversation_id, log, is_whole=False)
                readings = {}
            for conversation_id, reading in readings.items():
                self._take(conversation_id, logs[conversation_id], reading)
            if any(reading.has_lapsed for reading in readings.values()):
                on_lapsed()
            took = now() - started
            await asyncio.sleep(max(READ_SECONDS - took, took))  # at most half of the time, however much there is

    def _take(self, conversation_id: UUID, log: Log, reading: Reading) -> None:
        channel = self._channels.get(conversation_id)
        if channel is None or self._remote.get(conversation_id) is not log:
            return  # nobody follows any more, or the turn runs here by now
        if reading.is_broken:
            self.end_log(conversation_id, log, is_whole=False)
            return
        log.events.extend(reading.events)
        is_over = reading.is_complete and not reading.is_running
        if is_over or any(event.type in _TERMINAL for event in reading.events):
            self.end_log(conversation_id, log)
            if not is_over:
                self._open_remote(conversation_id, channel, log.last_seq)
        elif reading.events:
            channel.wake()

    def _open_remote(self, conversation_id: UUID, channel: Channel, cursor: int) -> None:
        channel.log = self._remote[conversation_id] = Log(cursor + 1)
        self._has_remote.set()
        channel.wake()  # whoever has read less than the log begins with must read on

    # Followers.

    async def follow(
        self, user_id: str, conversation_id: UUID, after: int | None, *, is_own: bool = False
    ) -> AsyncGenerator[Step, None]:
        """Everything after the cursor, in order, for ever: batches of events, and a snapshot where there is no cursor
        or the journal does not hold what follows it. `is_own` says that the conversation is known to be the user's.
        Raises NotFound, or Unavailable (then follow again)."""
        channel = self._channels.setdefault(conversation_id, Channel())
        channel.followers += 1
        log: Log | None = None  # where this follower reads while a turn runs, or ran
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
                    reading = await self._read(channel, user_id, conversation_id, after)
                    is_own = True
                    if reading.is_broken:
                        snapshot = await self._snapshot(user_id, conversation_id)
                        after = snapshot.seq
                        yield snapshot
                        continue
                    if reading.events:
                        after = reading.events[-1].seq
                    if reading.is_complete:
                        read_at = changes
                        if reading.is_running and channel.log is None:
                            self._open_remote(conversation_id, channel, after)
                    if reading.events:
                        yield reading.events
        finally:
            channel.followers -= 1
            self._drop_if_unused(conversation_id, channel)

    async def keep_following(
        self, user_id: str, conversation_id: UUID, after: int | None, *, is_own: bool = False
    ) -> AsyncGenerator[Step | DatabaseUnavailable, None]:
        """Follow as `follow` does, also while Postgres is away: yield DatabaseUnavailable then, and go on from the
        cursor. Raises NotFound."""
        while True:
            try:
                async with aclosing(self.follow(user_id, conversation_id, after, is_own=is_own)) as updates:
                    async for update in updates:
                        after = update.seq if isinstance(update, Snapshot) else update[-1].seq
                        yield update
            except Unavailable as error:
                unavailable = DatabaseUnavailable(conversation_id=conversation_id)
                unavailable.__cause__ = error
                yield unavailable

    async def _read(self, channel: Channel, user_id: str, conversation_id: UUID, after: int) -> Reading:
        """What lies after the cursor; those who ask the same at the same change share one reading."""
        key = (user_id, after, channel.changes)
        task = channel.readings.get(key)
        if task is None:
            task = asyncio.create_task(
                read_events(self._database, user_id, conversation_id, after, limit=EVENTS_READ_MAX)
            )
            channel.readings[key] = task
            task.add_done_callback(lambda done: (channel.readings.pop(key), done.cancelled() or done.exception()))
        reading = await asyncio.shield(task)  # it is not only this follower's
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
        if channel.followers or self._channels.get(conversation_id) is not channel:
            return
        if (remote := self._remote.get(conversation_id)) is not None and channel.log is remote:
            del self._remote[conversation_id]
            channel.log = None
        if channel.log is None:
            del self._channels[conversation_id]
