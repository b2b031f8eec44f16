"""Decoding of what clients send: short texts at once, long ones beside the event loop, one at a time, user by user."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Final, TypeVar

Data = TypeVar("Data", str, bytes)
Decoded = TypeVar("Decoded")

AT_ONCE_BYTES_MAX: Final = 16_384  # a longer text is decoded in a thread: turns must not stop for it
PAUSE_PER_SECOND: Final = 2.0  # seconds without decoding after each second of it


class FairDecoding:
    """Decodes for all users of a node.

    Threads of Python share one interpreter. Two at once would not be faster and would leave less of it to the event
    loop. Nor does the decoder let go of it while it reads a long list. So after each long text there is a pause, in
    which only the loop runs: whatever users send, it has two thirds of the time.
    """

    def __init__(self) -> None:
        self._turns = UsersInTurn()

    async def decode(self, user_id: str, data: Data, decode: Callable[[Data], Decoded]) -> Decoded:
        """Return what `decode` makes of the data, or raise what it raises."""
        if len(data) <= AT_ONCE_BYTES_MAX:
            return decode(data)
        await self._turns.wait_turn(user_id)
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            return await asyncio.to_thread(decode, data)
        finally:
            loop.call_later((loop.time() - began) * PAUSE_PER_SECOND, self._turns.end_turn)


class UsersInTurn:
    """A lock whose waiters are let in user by user. A user with a thousand waiters delays another one by one turn."""

    def __init__(self) -> None:
        self._is_taken = False
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    async def wait_turn(self, user_id: str) -> None:
        """Wait for the user's turn, and have it until `end_turn`."""
        if not self._is_taken:
            self._is_taken = True
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(user_id, deque()).append(future)
        try:
            await future
        except asyncio.CancelledError:
            if not future.cancelled():  # the turn had been handed over
                self.end_turn()
            raise

    def end_turn(self) -> None:
        """Let in the next user's next waiter."""
        while self._waiting:
            user_id, futures = self._waiting.popitem(last=False)
            future = futures.popleft()
            if futures:
                self._waiting[user_id] = futures  # behind all others
            if not future.done():  # else who waited was cancelled
                future.set_result(None)
                return
        self._is_taken = False
