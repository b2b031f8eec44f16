"""The rules of a conversation as data: who may speak next, how a turn may end, what an agent gets to see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

# What may follow a message of the given role (None: the conversation is empty). The admission function in
# `migrations/` re-checks the line for `user` under the conversation's lock.
NEXT_ROLES: Mapping[str | None, frozenset[str]] = {
    None: frozenset({"system", "user"}),
    "system": frozenset({"user"}),
    "user": frozenset({"assistant"}),
    "assistant": frozenset({"user", "tool"}),
    "tool": frozenset({"tool", "assistant"}),
}

RUNNING = "running"
COMPLETED = "completed"
CANCELLED = "cancelled"
FAILED = "failed"
SUPERSEDED = "superseded"

# The states of a turn and where each may go; an ended turn never changes again.
TURN_TRANSITIONS: Mapping[str, frozenset[str]] = {
    RUNNING: frozenset({COMPLETED, CANCELLED, FAILED}),
    COMPLETED: frozenset(),
    CANCELLED: frozenset(),
    FAILED: frozenset(),
}

# The event that ends a turn with the given status.
TERMINAL_EVENTS: Mapping[str, str] = {
    COMPLETED: "turn.completed",
    CANCELLED: "turn.cancelled",
    FAILED: "turn.failed",
}


class Spoken(Protocol):
    """The part of a message that decides whether an agent sees it."""

    @property
    def role(self) -> str: ...
    @property
    def content(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def turn_id(self) -> object: ...


AnySpoken = TypeVar("AnySpoken", bound=Spoken)


def visible(messages: Sequence[AnySpoken]) -> Sequence[AnySpoken]:
    """What an agent sees of `messages` (in order): beginning with a user's, without superseded answers, and
    without the turns that were cancelled or failed before they said anything (their questions included)."""
    silent = {
        m.turn_id for m in messages if m.role == "assistant" and not m.content and m.status in (CANCELLED, FAILED)
    }
    if silent:  # an empty end may come after tools that have done something
        silent -= {m.turn_id for m in messages if m.role == "tool" or (m.role == "assistant" and m.content)}
    kept: Sequence[AnySpoken] = messages
    if silent or any(message.status == SUPERSEDED for message in messages):
        kept = [m for m in messages if m.status != SUPERSEDED and (m.turn_id is None or m.turn_id not in silent)]
    for start, message in enumerate(kept):
        if message.role == "user":
            return kept[start:] if start else kept
    return []
