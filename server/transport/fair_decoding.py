"""Decoding of what clients send: short texts at once, long ones beside the event loop, one at a time, user by user."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final, TypeVar

Data = TypeVar("Data", str, bytes)
Decoded = TypeVar("Decoded")

AT_ONCE_BYTES_MAX: Final = 16_384  # a longer text is decoded in a thread: turns must not stop for it


class FairDecoding:
    """Decodes for all users of a node. Threads of Python share one interpreter: two at once would not be faster, and
    would leave less of it to the event loop."""

    def __init__(self) -> None:
        self._turns = UsersInTurn()

    async def decode(self, user_id: str, data: Data, decode: Callable[[Data], Decoded]) -> Decoded:
        """Return what `decode` makes of the data, or raise what it raises."""
        if len(data) <= AT_ONCE_BYTES_MAX:
            return decode(data)
        async with self._turns.wait_turn(user_id):
            return await asyncio.to_thread(decode, data)


class UsersInTurn:
    """A lock whose waiters are let in user by user. A user with a thousand waiters delays another one by one turn."""

    def __init__(self) -> None:
        self._is_taken = False
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @asynccontextmanager
    async def wait_turn(self, user_id: str) -> AsyncIterator[None]:
        """Wait for the user's turn, and have it while the context lasts."""
        await self._enter(user_id)
        try:
            yield
        finally:
            self._leave()

    async def _enter(self, user_id: str) -> None:
        if not self._is_taken:
            self._is_taken = True
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(user_id, deque()).append(future)
        try:
            await future
        except asyncio.CancelledError:
            if not future.cancelled():  # the turn had been handed over
                self._leave()
            raise

    def _leave(self) -> None:
        while self._waiting:
            user_id, futures = self._waiting.popitem(last=False)
            future = futures.popleft()
            if futures:
                self._waiting[user_id] = futures  # behind all others
            if not future.done():  # else who waited was cancelled
                future.set_result(None)
                return
        self._is_taken = False
