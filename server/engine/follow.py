"""Following: one conversation's journal from a cursor on, then live. The rows in Postgres are the truth.

A follower is a cursor, not a queue: a slow client reads later, so nothing is dropped and nothing piles up. While it
waits it keeps nothing of what it was shown: a variable is deleted once its value was used, here and wherever updates
are taken, since a follower may wait for days with the frames of its functions. While a turn
runs, its followers on one node share a log. Where the turn runs here, the log holds what this node has committed. Where
it runs elsewhere, one statement reads for all such conversations. A follower behind the log reads Postgres until it has
caught up.

`cursor` decides what a follower does next. Here it is done.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Hashable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Final, TypeAlias, TypeVar, assert_never
from uuid import UUID

from anynode.models.conversations import Snapshot, read_snapshot
from anynode.models.database import Database, Unavailable
from anynode.models.events import Event, Reading, read_events, read_running
from anynode.server.engine.cursor import Channel, Cursor, Log, outcome_of
from anynode.server.engine.held import Held
from anynode.server.engine.postgres_errors import unavailable_as_client_error
from anynode.server.errors import DatabaseUnavailable, NotFound

logger = logging.getLogger("anynode.follow")

EVENTS_READ_MAX: Final = 1000  # rows of one read from Postgres for a follower
EVENTS_POLLED_MAX: Final = 63  # … and of what one of many turns elsewhere has said in 50 ms
READ_SECONDS: Final = 0.05  # between two readings of the turns that run elsewhere
READ_TIMEOUT_SECONDS: Final = 2.0

Update: TypeAlias = Sequence[Event] | Snapshot
Key = TypeVar("Key", bound=Hashable)
Found = TypeVar("Found")


class LiveChannel(Channel):
    """A channel whose followers wait for its next change, and share what they read."""

    __slots__ = ("_loop", "_waiting", "readings", "snapshots")

    def __init__(self) -> None:
        super().__init__()
        self.readings: dict[tuple[str, int, int], asyncio.Task[Reading | None]] = {}
        self.snapshots: dict[tuple[str, int], asyncio.Task[Snapshot | None]] = {}
        self._loop = asyncio.get_running_loop()  # kept: asking for it is a system call, once a token and follower
        self._waiting: set[asyncio.Future[None]] = set()

    def wake(self) -> None:
        """Count a change, and let all followers look again."""
        self.changes += 1
        for future in self._waiting:
            if not future.done():
                future.set_result(None)

    async def wait_change(self) -> None:
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
        self._channels: dict[UUID, LiveChannel] = {}
        self._remote: dict[UUID, Log] = {}  # the logs of turns that run on other nodes
        self._has_remote = asyncio.Event()
        self._held = Held()

    # Turns that run here.

    def start_log(self, conversation_id: UUID, events: Sequence[Event]) -> Log:
        """Begin the log of a turn that runs here from now on, and wake its followers; `events` are committed."""
        channel = self._channels.setdefault(conversation_id, LiveChannel())
        if (remote := self._remote.pop(conversation_id, None)) is not None:
            remote.is_over = True
        log = Log(events[0].seq, events)
        channel.begin(log)
        return log

    def extend_log(self, conversation_id: UUID, log: Log, events: Sequence[Event], *, is_over: bool) -> None:
        """Add events that are committed to a log, and wake its followers."""
        log.extend(events)
        if is_over:
            self.end_log(conversation_id, log)
        elif (channel := self._channels.get(conversation_id)) is not None:
            channel.wake()

    def end_log(self, conversation_id: UUID, log: Log, *, is_whole: bool = True) -> None:
        """End a log: its turn is over, or (not `is_whole`) what follows is not read here.

        Followers that are behind keep the log until they have shown it.
        """
        if log.is_over:
            return
        log.is_over = True
        if self._remote.get(conversation_id) is log:
            del self._remote[conversation_id]
        if (channel := self._channels.get(conversation_id)) is not None:
            channel.end(log, is_whole=is_whole)
            self._drop_if_unused(conversation_id, channel)

    # Turns that run on other nodes.

    def hear(self, begun: Mapping[UUID, int]) -> None:
        """Note that turns have begun somewhere, in conversations (id → last seq) that may be followed here."""
        for conversation_id, last_seq in begun.items():
            if (channel := self._channels.get(conversation_id)) is not None:
                channel.hear(last_seq)

    def wake(self, conversation_id: UUID) -> None:
        """Let the followers of a conversation look again."""
        if (channel := self._channels.get(conversation_id)) is not None:
            channel.wake()

    def look_again(self) -> None:
        """Let all followers look again: anything may have happened, also that Postgres has lost events."""
        for channel in self._channels.values():
            channel.doubt()

    async def read_remote(self, on_lapsed: Callable[[], object]) -> None:
        """Read what other nodes commit, for ever. `on_lapsed` is called when a turn's node has lost its lease."""
        now = asyncio.get_running_loop().time
        while True:
            await self._has_remote.wait()
            if not self._remote:
                self._has_remote.clear()
                continue
            started = now()
            if any(reading.has_lapsed for reading in (await self._read_remote_once()).values()):
                on_lapsed()
            took = now() - started
            await asyncio.sleep(max(READ_SECONDS - took, took))  # at most half of the time, however much there is

    async def _read_remote_once(self) -> Mapping[UUID, Reading]:
        logs = dict(self._remote)
        try:
            readings = await read_running(
                self._database,
                {conversation_id: log.last_seq for conversation_id, log in logs.items()},
                limit=EVENTS_POLLED_MAX,
                within_seconds=READ_TIMEOUT_SECONDS,
            )
        except Exception as error:
            if not isinstance(error, Unavailable):
                logger.exception("the turns of other nodes could not be read")
            for conversation_id, log in logs.items():
                # Its followers read by themselves, and tell their clients what is wrong.
                self.end_log(conversation_id, log, is_whole=False)
            return {}
        for conversation_id, reading in readings.items():
            self._take_remote(conversation_id, logs[conversation_id], reading)
        return readings

    def _take_remote(self, conversation_id: UUID, log: Log, reading: Reading) -> None:
        channel = self._channels.get(conversation_id)
        if channel is None or self._remote.get(conversation_id) is not log:
            return  # nobody follows it any more, or the turn runs here by now
        outcome = outcome_of(reading)
        if outcome != "broken":
            log.extend(reading.events)
        match outcome:
            case "broken":
                self.end_log(conversation_id, log, is_whole=False)
            case "over":
                self.end_log(conversation_id, log)
            case "next turn":
                self.end_log(conversation_id, log)
                self._open_remote(conversation_id, channel, log.last_seq)
            case "more":
                channel.wake()
            case "nothing":
                pass
            case _:
                assert_never(outcome)

    def _open_remote(self, conversation_id: UUID, channel: LiveChannel, after: int) -> None:
        log = self._remote[conversation_id] = Log(after + 1)
        self._has_remote.set()
        channel.begin(log)

    # Followers.

    async def follow(
        self, user_id: str, conversation_id: UUID, after: int | None, *, is_own: bool = False
    ) -> AsyncGenerator[Update, None]:
        """Yield everything after the cursor, in order, for ever: batches of events, and snapshots.

        A snapshot comes where `after` is None, or where the journal does not hold what follows the cursor. `is_own`
        says that the conversation is known to be the user's. Raises NotFound, or Unavailable (then follow again).
        """
        channel = self._channels.setdefault(conversation_id, LiveChannel())
        channel.followers += 1
        cursor = Cursor(after, is_own=is_own)
        try:
            while True:
                update = cursor.next(channel)
                if isinstance(update, list):  # not `match`: this is run twice for each token and follower
                    yield update
                    del update
                elif update == "change":
                    await channel.wait_change()
                elif update == "reading":
                    async with self._held.piece(user_id):  # until it has been sent, and the next one is asked for
                        assert cursor.after is not None
                        changes = channel.changes
                        reading = await self._read(channel, user_id, conversation_id, cursor.after)
                        events = cursor.take_reading(reading, changes)
                        if channel.needs_log(reading):
                            self._open_remote(conversation_id, channel, cursor.after)
                        del reading
                        if events:
                            yield events
                        del events
                elif update == "snapshot":
                    async with self._held.piece(user_id):
                        snapshot = await self._snapshot(channel, user_id, conversation_id)
                        cursor.take_snapshot(snapshot.seq)
                        yield snapshot
                        del snapshot
                else:
                    assert_never(update)
        finally:
            channel.followers -= 1
            self._drop_if_unused(conversation_id, channel)

    async def keep_following(
        self, user_id: str, conversation_id: UUID, after: int | None, *, is_own: bool = False
    ) -> AsyncGenerator[Update | DatabaseUnavailable, None]:
        """Follow as `follow` does, also while Postgres is away: yield DatabaseUnavailable then, and go on from the
        cursor. Raises NotFound."""
        while True:
            following = self.follow(user_id, conversation_id, after, is_own=is_own)
            try:
                async with aclosing(following) as updates:
                    with unavailable_as_client_error(conversation_id):
                        async for update in updates:
                            after = update.seq if isinstance(update, Snapshot) else update[-1].seq
                            yield update
                            del update
            except DatabaseUnavailable as unavailable:
                yield unavailable

    async def _read(self, channel: LiveChannel, user_id: str, conversation_id: UUID, after: int) -> Reading:
        """Read what follows the cursor. Followers that ask the same at the same version share one reading."""
        reading = await _shared(
            channel.readings,
            (user_id, after, channel.changes),
            lambda: read_events(self._database, user_id, conversation_id, after, limit=EVENTS_READ_MAX),
        )
        if reading is None:
            raise NotFound(conversation_id=conversation_id)
        return reading

    async def _snapshot(self, channel: LiveChannel, user_id: str, conversation_id: UUID) -> Snapshot:
        """Read a snapshot. Followers that ask at the same version share it; each reads on from its seq."""
        snapshot = await _shared(
            channel.snapshots,
            (user_id, channel.changes),
            lambda: read_snapshot(self._database, user_id, conversation_id, messages_max=self._snapshot_messages_max),
        )
        if snapshot is None:
            raise NotFound(conversation_id=conversation_id)
        return snapshot

    def _drop_if_unused(self, conversation_id: UUID, channel: LiveChannel) -> None:
        if channel.followers or self._channels.get(conversation_id) is not channel:
            return
        if (remote := self._remote.get(conversation_id)) is not None and channel.log is remote:
            del self._remote[conversation_id]
            channel.log = None
        if channel.log is None:
            del self._channels[conversation_id]


async def _shared(
    under_way: dict[Key, asyncio.Task[Found]], key: Key, read: Callable[[], Coroutine[Any, Any, Found]]
) -> Found:
    """Return what is read under a key; those who ask for it while it is read share it, and none of them can stop it."""
    task = under_way.get(key)
    if task is None:
        task = under_way[key] = asyncio.create_task(read())
        task.add_done_callback(lambda done: (under_way.pop(key), done.cancelled() or done.exception()))
    return await asyncio.shield(task)
