"""Turns as clients have seen them, with times, and the gaps and delays in them. No I/O."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final, TypeAlias

Frame: TypeAlias = dict[str, Any]

ENDINGS: Final = frozenset({"turn.completed", "turn.cancelled", "turn.failed"})


@dataclass
class Seen:
    """One client's view of a conversation with one turn: its text, and the times of its pieces (seconds)."""

    text: str = ""
    seq: int = 0
    came: list[float] = field(default_factory=list)
    restarts: int = 0
    ending: str | None = None

    def hear(self, frame: Frame, at: float) -> None:
        """Add a frame, as a page would show it."""
        match frame["type"]:
            case "turn.delta":
                self.text += frame["text"]
                self.came.append(at)
            case "turn.restarted":
                self.text = frame["text"]
                self.restarts += 1
            case "conversation.snapshot":
                if frame["turn"] is not None:
                    self.text = frame["turn"]["text"]
                    self.came.append(at)
            case type if type in ENDINGS:
                self.ending = type
        self.seq = frame["seq"]


@dataclass(frozen=True)
class Stored:
    """A conversation with one turn, as the database holds it."""

    status: str
    content: str
    last_seq: int
    seqs: Sequence[int]


def longest_gap(came: Sequence[float], since: float) -> float:
    """Return the longest time between two neighbours of which the later one came after `since`."""
    gaps = [later - earlier for earlier, later in pairwise(came) if later > since]
    if not gaps:
        raise ValueError("nothing came after it")
    return max(gaps)


def fault_in(seen: Seen, stored: Stored, text: str) -> str | None:
    """Return the faults of a turn that should have ended with this text, at the client or in the database."""
    if stored.status != "completed" or seen.ending != "turn.completed":
        return f"it ended as {stored.status}, at the client as {seen.ending}"
    if stored.content != text:
        return f"the database has {stored.content[-20:]!r} at its end, not {text[-20:]!r}"
    if seen.text != stored.content:
        return f"the client has {len(seen.text)} characters, the database {len(stored.content)}"
    if stored.seqs != list(range(1, stored.last_seq + 1)):
        return f"the journal is not gapless from 1 to {stored.last_seq}"
    if seen.seq != stored.last_seq:
        return f"the client ends at seq {seen.seq}, the database at {stored.last_seq}"
    return None


def behind(local: Sequence[tuple[int, float]], remote: Sequence[tuple[int, float]]) -> list[float]:
    """Return how much later each local frame (seq, time) came to the remote follower, perhaps merged with later ones.
    Every one must have come."""
    seqs = [seq for seq, _ in remote]
    return [remote[bisect_left(seqs, seq)][1] - at for seq, at in local]


def token_numbers(frames: Iterable[Frame]) -> list[int]:
    """Return the numbers of the tokens `w0 w1 …` in the deltas among these frames."""
    text = "".join(frame["text"] for frame in frames if frame["type"] == "turn.delta")
    return [int(token.removeprefix("w")) for token in text.split()]
