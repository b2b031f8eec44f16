"""Shares: how many statements of one user may use the connections of a pool at once, and who waits for one.

A pool serves all users of a node. Without shares, one user whose statements are slow takes all of its connections, and
everybody else waits.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Final

_TENTHS: Final = 3  # of a pool: three users who take all they can leave room for a fourth


def share_of(pool_max: int) -> int:
    """Return how many of a pool's connections one user may use at once: three tenths, and at least one."""
    return max(1, -(-pool_max * _TENTHS // 10))


class Shares:
    """The statements of each user that run now, at most `share_max` of them, and those that wait, in order.

    Nothing is kept of a user without a statement.
    """

    def __init__(self, share_max: int) -> None:
        self._share_max = share_max
        self._users: dict[str, _Share] = {}

    def __len__(self) -> int:
        return len(self._users)

    def take_now(self, user_id: str) -> bool:
        """Take one for a statement that begins, if there is one. What is taken must be given back."""
        share = self._users.get(user_id)
        if share is None:
            share = self._users[user_id] = _Share()
        if share.taken >= self._share_max:
            return False
        share.taken += 1
        return True

    async def wait(self, user_id: str) -> None:
        """Wait for one after `take_now` had none. Those who wait get one in the order in which they came."""
        share = self._users[user_id]
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        share.waiting[turn] = None
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                share.waiting.pop(turn, None)
            else:  # it was given one at the same instant
                self.give(user_id)
            raise

    def give(self, user_id: str) -> None:
        """Give one back: to the statement that has waited longest, if there is any."""
        share = self._users[user_id]
        while share.waiting:
            turn, _ = share.waiting.popitem(last=False)
            if not turn.done():
                turn.set_result(None)
                return
        share.taken -= 1
        if not share.taken:
            del self._users[user_id]


class _Share:
    """What one user has of the pool. Somebody waits only while all of it is taken."""

    __slots__ = ("taken", "waiting")

    def __init__(self) -> None:
        self.taken = 0
        self.waiting: OrderedDict[asyncio.Future[None], None] = OrderedDict()
