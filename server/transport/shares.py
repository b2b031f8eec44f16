"""What all users of a node share, and how much of it one user may take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from anynode.server.auth import Identity
from anynode.server.errors import RateLimited
from anynode.server.settings import Settings
from anynode.server.transport.allowance import FrameBytes
from anynode.server.transport.fair_decoding import FairDecoding
from anynode.server.transport.sessions import Sessions
from anynode.server.transport.unauthenticated import Unauthenticated

if TYPE_CHECKING:
    from anynode.server.transport.connection import Connection

READ_BYTES_MAX: Final = 134_217_728  # of all bodies that are on their way to this process; more are refused …
READ_BYTES_PER_USER_MAX: Final = 16_777_216  # … and of one user's: an eighth, which is four of the longest


class Shares:
    """All shares of a node: one object, for everything that it serves."""

    def __init__(self, settings: Settings, is_revoked: Callable[[Identity], bool] = lambda identity: False) -> None:
        self.sessions = Sessions(settings.connections_max, is_revoked)
        self.unauthenticated: Unauthenticated[Connection] = Unauthenticated(
            total_max=settings.unauthenticated_max, per_address_max=settings.unauthenticated_per_address_max
        )
        self.reading = ReadBytes(READ_BYTES_MAX, READ_BYTES_PER_USER_MAX)
        self.frame_bytes = FrameBytes()
        self.decoding = FairDecoding()


class ReadBytes:
    """The bytes of bodies that are being read: at most `total_max`, and at most `per_user_max` of one user."""

    def __init__(self, total_max: int, per_user_max: int) -> None:
        self._total_max = total_max
        self._per_user_max = per_user_max
        self._of_user: Counter[str] = Counter()
        self._total = 0

    @property
    def total(self) -> int:
        """How many bytes are being read."""
        return self._total

    def take(self, user_id: str, count: int) -> None:
        """Count more bytes for a user, until they are given back. Raises RateLimited, and then counts none of them."""
        if self._of_user.get(user_id, 0) + count > self._per_user_max:
            raise RateLimited(
                f"You are sending more than {self._per_user_max} bytes to this node at once; send one after the other.",
                limit="read_bytes_per_user_max",
                limit_max=self._per_user_max,
            )
        if self._total + count > self._total_max:
            raise RateLimited(
                "This node is at its limit of bytes that are being received; try again.",
                limit="read_bytes_max",
                limit_max=self._total_max,
            )
        self._of_user[user_id] += count
        self._total += count

    def give_back(self, user_id: str, count: int) -> None:
        """Count bytes no more."""
        self._total -= count
        self._of_user[user_id] -= count
        if not self._of_user[user_id]:
            del self._of_user[user_id]
