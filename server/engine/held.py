"""What was read from Postgres for a user's followers and is not sent yet, bounded.

A piece is a snapshot or a part of the journal, and may have some megabytes. A client that follows a thousand
conversations and reads nothing would otherwise have as many pieces wait in memory. Followers beyond the bound wait
before they read. They hold nothing then but their cursors.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

HELD_PER_USER_MAX: Final = 16  # pieces; an ordinary client takes one within a millisecond


class Held:
    """Counts the pieces of each user."""

    def __init__(self, per_user_max: int = HELD_PER_USER_MAX) -> None:
        self._per_user_max = per_user_max
        self._users: dict[str, _User] = {}

    def __len__(self) -> int:
        """Return how many users have pieces, or wait for one."""
        return len(self._users)

    @asynccontextmanager
    async def piece(self, user_id: str) -> AsyncIterator[None]:
        """Wait until the user may have one piece more, and count it while the context lasts."""
        user = self._users.get(user_id)
        if user is None:
            user = self._users[user_id] = _User(self._per_user_max)
        user.count += 1
        try:
            async with user.room:
                yield
        finally:
            user.count -= 1
            if not user.count:
                del self._users[user_id]


class _User:
    __slots__ = ("count", "room")

    def __init__(self, pieces_max: int) -> None:
        self.count = 0  # pieces, and followers that wait for one
        self.room = asyncio.Semaphore(pieces_max)
