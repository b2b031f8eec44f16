"""How much one WebSocket may send, counted before it is parsed. Given the input and the time; no I/O.

A frame costs a peer six bytes, and the node some microseconds to parse, whatever it holds. So the frames of a peer are
counted by their headers, control frames and fragments included, and a peer that sends too many is cut off. Bytes cost
little, and a long message is honest; so a peer that sends too many bytes is made to wait.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

_CLOSE: Final = 8  # opcodes (RFC 6455, 5.2); those from here on are control frames
_FIN: Final = 0x80
_PINGS: Final = (0x89, 0x8A)  # the first byte of a ping and of a pong
_MASKED: Final = 0x80
_OPCODE: Final = 0x0F
_LENGTH: Final = 0x7F


class Rates(NamedTuple):
    """What may come at once, and in the long run."""

    frames_burst: int
    frames_per_second: float
    bytes_burst: int
    bytes_per_second: float


class InputBudget:
    """What one connection may still send: two buckets that fill up again with time."""

    __slots__ = ("_at", "_bytes", "_frames", "_rates")

    def __init__(self, rates: Rates, now: float) -> None:
        self._rates = rates
        self._at = now
        self._frames: float = rates.frames_burst
        self._bytes: float = rates.bytes_burst

    def take(self, frames: int, length: int, now: float) -> float:
        """Spend the budget for `frames` frames that begin in the next `length` bytes.

        Return for how many seconds nothing more may be read, mostly 0. Infinity: the peer has sent too much.
        """
        frames_burst, frames_per_second, bytes_burst, bytes_per_second = self._rates
        passed = now - self._at
        self._at = now
        self._frames = min(frames_burst, self._frames + passed * frames_per_second) - frames
        self._bytes = min(bytes_burst, self._bytes + passed * bytes_per_second) - length
        if self._frames < 0:
            return math.inf
        if self._bytes >= 0:
            return 0.0
        return -self._bytes / bytes_per_second if bytes_per_second else math.inf


class FrameHeaders:
    """Where the frames and messages of a peer's input begin and end, as the headers of the frames say.

    What is wrong with a frame is not found out here, but by the parser, which is given all of it.
    """

    __slots__ = ("_ends_message", "_first", "_head", "_is_in_message", "_left")

    def __init__(self) -> None:
        self._head = b""  # of a header that has come in part
        self._first = 0  # the first byte of the frame
        self._left = 0  # bytes of the frame that have not come yet, its mask included
        self._is_in_message = False  # fragments of a message have come, and not its last one
        self._ends_message = False  # the frame is the last one of its message

    @property
    def is_between_messages(self) -> bool:
        """Whether no message, and no frame, has come in part."""
        return not self._left and not self._head and not self._is_in_message

    def is_ping(self, data: bytes, start: int) -> bool:
        """Return whether what comes at `start` belongs to a ping or a pong."""
        first = self._first if self._left else self._head[0] if self._head else data[start]
        return first in _PINGS

    def cut(self, data: bytes, start: int, frames_max: int) -> tuple[int, int]:
        """Return the end of the next piece of `data` and how many frames begin in it.

        A piece has at most `frames_max` frames, at least one. It ends where a message does, and before a close frame.
        """
        at, end, frames = start, len(data), 0
        while at < end:
            if not self._left:
                if at > start and (frames == frames_max or data[at] & _OPCODE == _CLOSE):
                    break
                at = self._read_header(data, at)
                if self._head:
                    break
                frames += 1
            step = min(self._left, end - at)
            at += step
            self._left -= step
            if not self._left and self._ends_message:
                self._ends_message = False
                break
        return at, frames

    def _read_header(self, data: bytes, at: int) -> int:
        """Read a header, or what has come of it; return where it ends."""
        before = len(self._head)
        head = self._head + data[at : at + 10 - before]
        length = head[1] & _LENGTH if len(head) > 1 else 0
        size = 2 if length < 126 else 4 if length == 126 else 10
        if len(head) < size:
            self._head = head
            return at + len(head) - before
        self._head = b""
        if size > 2:
            length = int.from_bytes(head[2:size], "big")
        self._first = head[0]
        self._left = length + (4 if head[1] & _MASKED else 0)
        if head[0] & _OPCODE < _CLOSE:
            self._is_in_message = not head[0] & _FIN
            self._ends_message = not self._is_in_message
        return at + size - before
