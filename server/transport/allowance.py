"""How much a client may send over a socket: frames, and bytes of them. No I/O."""

from __future__ import annotations

import math
from typing import Final

from anynode.server.errors import RateLimited

FRAMES_BURST: Final = 500  # frames that may come at once …
FRAMES_PER_SECOND: Final = 100  # … and in the long run; more are refused
FRAME_BYTES_BURST: Final = 8_388_608  # bytes of frames that may come at once: twice the longest frame …
FRAME_BYTES_PER_SECOND: Final = 1_048_576  # … and in the long run: decoding as many takes a tenth of a core
REFUSALS_MAX: Final = 1000  # a client that sends this many refused frames without a pause is disconnected


class NotSlowingDown(Exception):
    """A client goes on sending although its frames are refused."""


class Allowance:
    """How much a client may still send: two buckets, of frames and of their bytes, that fill up again with time. Given
    the time; no I/O."""

    __slots__ = ("_at", "_bytes_left", "_left", "_refusals")

    def __init__(self, now: float) -> None:
        self._left = float(FRAMES_BURST)
        self._bytes_left = float(FRAME_BYTES_BURST)
        self._at = now
        self._refusals = 0

    def take(self, now: float, size: int = 0) -> None:
        """Spend the allowance for one frame of `size` bytes. Raises RateLimited where there is not enough left, and
        NotSlowingDown for a client that goes on all the same."""
        passed = now - self._at
        self._left = min(FRAMES_BURST, self._left + passed * FRAMES_PER_SECOND)
        self._bytes_left = min(FRAME_BYTES_BURST, self._bytes_left + passed * FRAME_BYTES_PER_SECOND)
        self._at = now
        if self._left == FRAMES_BURST and self._bytes_left == FRAME_BYTES_BURST:
            self._refusals = 0
        if self._left >= 1 and self._bytes_left >= size:
            self._left -= 1
            self._bytes_left -= size
            return
        self._refusals += 1
        if self._refusals > REFUSALS_MAX:
            raise NotSlowingDown
        if self._left < 1:
            raise RateLimited(
                f"More than {FRAMES_PER_SECOND} frames a second.",
                limit="frames_per_second",
                limit_max=FRAMES_PER_SECOND,
            )
        raise RateLimited(
            f"More than {FRAME_BYTES_PER_SECOND} bytes of frames a second.",
            limit="frame_bytes_per_second",
            limit_max=FRAME_BYTES_PER_SECOND,
            retry_after_ms=_milliseconds_until(size - self._bytes_left),
        )


def _milliseconds_until(missing_bytes: float) -> int:
    """Return after how many milliseconds as many bytes more may come."""
    return math.ceil(min(missing_bytes, FRAME_BYTES_BURST) / max(FRAME_BYTES_PER_SECOND, 1) * 1000)


def size_of(text: str) -> int:
    """Return how many bytes of UTF-8 a frame has."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
