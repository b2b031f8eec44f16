"""Waiting for the end of a turn that is in the way: of a message that interrupts it, or of a deletion.

Who finds a turn in the way (the attempt says `conversation_busy`) does this, and then makes the attempt again:

    1. ask for the turn to be stopped, in a statement that also reads the last seq S of the conversation's journal. It
       sees one instant: if the turn runs in it, its end comes after S, as the end and the turn's status are committed
       together. If it does not run any more, there is nothing to wait for.
    2. follow the conversation from S up to the turn's end. Where the turn runs here, the follower reads from memory.
       Where it runs elsewhere, it reads once, and then the statement that reads all such turns every 50 ms has it. So
       waiting costs the same few statements, however long it takes.

Of those who interrupt one conversation on one node, one does this at a time, in the order in which they found the turn
in their way; the others would only make attempts that fail. Each of them makes its first attempt before it waits: a
repeated message finds its turn, and another user's conversation looks like none.

What may happen meanwhile:

| meanwhile | then |
|---|---|
| the turn ends before step 1 | step 1 says so, or step 2 finds its end at once |
| the turn ends between the steps | its end comes after S: step 2 finds it |
| another turn begins first | the attempt finds that one in its way, and everything begins again |
| the turn's node dies | its lease runs out; the node that takes it over finds that it is to be stopped, and ends it |
| the turn is lost by this node | the same: the follower goes on with what its next node commits |
| the conversation is deleted | following raises NotFound; the attempt says so as well |
| the journal loses S (a failover) | following shows a snapshot; the attempt is made again after a moment |
| Postgres is away | DatabaseUnavailable, as an attempt would say |
| this node begins to drain | the wait ends, and the attempt says that the node drains |
| the time is over | one last attempt is made, and its outcome counts |
| the client goes | the next one in the order goes on |
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Final, TypeVar
from uuid import UUID

from anynode.models.conversations import Snapshot
from anynode.models.rules import TERMINAL_TYPES
from anynode.server.engine.follow import Follows, Update
from anynode.server.engine.postgres_errors import unavailable_as_client_error
from anynode.server.errors import NotFound

AGAIN_SECONDS: Final = 0.05  # before another attempt, where the turn's end was not seen
_CLOCK_SECONDS: Final = 0.01  # a timer may ring this much early

Outcome = TypeVar("Outcome")


class Interrupts:
    """The waits of this node for turns that are in the way."""

    def __init__(self, follows: Follows, draining: asyncio.Event) -> None:
        self._follows = follows
        self._draining = draining
        self._queues: dict[tuple[str, UUID], _Queue] = {}

    @asynccontextmanager
    async def one_at_a_time(
        self, user_id: str, conversation_id: UUID, *, within_seconds: float
    ) -> AsyncIterator[tuple[bool, float]]:
        """Wait until all who came before have gone on, at most `within_seconds`, and keep the place while the context
        lasts. Yields whether that took any waiting, and how many of the seconds are left."""
        key = (user_id, conversation_id)
        queue = self._queues.setdefault(key, _Queue())
        queue.length += 1
        give_up_at = time.monotonic() + within_seconds
        has_waited = queue.lock.locked()
        has_place = False
        try:
            try:
                async with asyncio.timeout(within_seconds):
                    await queue.lock.acquire()
                has_place = True
            except TimeoutError:
                pass
            yield has_waited, max(0.0, give_up_at - time.monotonic())
        finally:
            if has_place:
                queue.lock.release()
            queue.length -= 1
            if not queue.length:
                del self._queues[key]

    async def wait_end(
        self, user_id: str, conversation_id: UUID, turn_id: UUID, after: int, *, within_seconds: float
    ) -> None:
        """Wait until a turn has ended whose end comes after the seq `after`, or something else makes another attempt
        worth while (see above), at most `within_seconds`. Raises DatabaseUnavailable."""
        updates = self._follows.follow(user_id, conversation_id, after, is_own=True)
        ending = asyncio.create_task(_shows_end(updates, turn_id))
        draining = asyncio.create_task(self._draining.wait())
        try:
            await asyncio.wait((ending, draining), timeout=within_seconds, return_when=asyncio.FIRST_COMPLETED)
            if ending.done():
                with unavailable_as_client_error(conversation_id):
                    if not ending.result():
                        await asyncio.sleep(AGAIN_SECONDS)
        finally:
            ending.cancel()
            draining.cancel()
            await asyncio.gather(ending, draining, return_exceptions=True)


class _Queue:
    """The waits in one conversation, the one that goes on included; the lock keeps them in order."""

    __slots__ = ("length", "lock")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.length = 0


async def _shows_end(updates: AsyncGenerator[Update, None], turn_id: UUID) -> bool:
    """Take updates up to the turn's end. Return False where the journal does not show it."""
    wanted = str(turn_id)
    try:
        async with aclosing(updates):
            async for update in updates:
                if isinstance(update, Snapshot):
                    return False
                if any(event.turn_id == wanted and event.type in TERMINAL_TYPES for event in update):
                    return True
                del update
    except NotFound:
        pass
    return False


async def repeat_while_busy(
    attempt: Callable[[bool], Awaitable[Outcome]],
    stop: Callable[[Outcome, float], Awaitable[bool]],
    *,
    within_seconds: float,
    first: Outcome | None = None,
) -> Outcome:
    """Make an attempt, and make it again while a running turn is in its way. Returns the outcome of the last one.

    `first` is the outcome of an attempt that was made already. `stop` asks the turn that an outcome names to stop and
    waits for its end, at most for the seconds that it is given; it returns False where none is in the way. An attempt
    that begins after `within_seconds` is the last one, and is told so: its outcome is returned as it is.
    """
    give_up_at = time.monotonic() + within_seconds
    outcome, is_last = first, False
    while True:
        if outcome is None:
            is_last = time.monotonic() > give_up_at  # by when it begins: a slow one must not be the last unawares
            outcome = await attempt(is_last)
        left_seconds = max(0.0, give_up_at - time.monotonic()) + _CLOCK_SECONDS
        if is_last or not await stop(outcome, left_seconds):
            return outcome
        outcome = None
