"""How much clients may send over sockets: frames over one, and bytes of all of one user's. No I/O."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Final

from anynode.server.errors import RateLimited

FRAMES_BURST: Final = 500  # frames that may come at once …
FRAMES_PER_SECOND: Final = 100  # … and in the long run; more are refused
REFUSALS_MAX: Final = 1000  # a client that sends this many refused frames without a pause is disconnected
FRAME_BYTES_BURST: Final = 8_388_608  # bytes of a user's frames that may come at once: twice the longest frame …
FRAME_BYTES_PER_SECOND: Final = 1_048_576  # … and in the long run: decoding as many takes up to a tenth of a core


class NotSlowingDown(Exception):
    """A client goes on sending although its frames are refused."""


class Allowance:
    """How many frames a client may still send: a bucket that fills up again with time. Given the time."""

    __slots__ = ("_at", "_left", "_refusals")

    def __init__(self, now: float) -> None:
        self._left = float(FRAMES_BURST)
        self._at = now
        self._refusals = 0

    def take(self, now: float) -> None:
        """Spend the allowance for one frame. Raises RateLimited where there is none left, and NotSlowingDown for a
        client that goes on all the same."""
        self._left = min(FRAMES_BURST, self._left + (now - self._at) * FRAMES_PER_SECOND)
        self._at = now
        if self._left == FRAMES_BURST:
            self._refusals = 0
        if self._left >= 1:
            self._left -= 1
            return
        self._refusals += 1
        if self._refusals > REFUSALS_MAX:
            raise NotSlowingDown
        raise RateLimited(
            f"More than {FRAMES_PER_SECOND} frames a second.", limit="frames_per_second", limit_max=FRAMES_PER_SECOND
        )


class FrameBytes:
    """How many bytes of frames each user may still send, over all sockets: buckets that fill up again with time. Given
    the time."""

    def __init__(self) -> None:
        # What is left and since when, of users whose buckets are not known to be full; who has sent last is last.
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        """Return how many buckets are kept."""
        return len(self._left)

    def take(self, user_id: str, now: float, size: int) -> None:
        """Spend a user's allowance for a frame of `size` bytes. Raises RateLimited where there is not enough left."""
        left = self._left_at(user_id, now)
        if left < size:
            raise RateLimited(
                f"More than {FRAME_BYTES_PER_SECOND} bytes of frames a second.",
                limit="frame_bytes_per_second",
                limit_max=FRAME_BYTES_PER_SECOND,
                retry_after_ms=math.ceil((size - left) / FRAME_BYTES_PER_SECOND * 1000),
            )
        self._left[user_id] = left - size, now
        self._left.move_to_end(user_id)
        longest_silent = next(iter(self._left))
        if self._left_at(longest_silent, now) == FRAME_BYTES_BURST:
            del self._left[longest_silent]

    def _left_at(self, user_id: str, now: float) -> float:
        left, at = self._left.get(user_id, (FRAME_BYTES_BURST, now))
        return min(FRAME_BYTES_BURST, left + (now - at) * FRAME_BYTES_PER_SECOND)


def size_of(text: str) -> int:
    """Return how many bytes of UTF-8 a frame has."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
