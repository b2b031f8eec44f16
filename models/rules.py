"""The rules of a conversation as data: who may speak next, how a turn may end, what an agent gets to see."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

# What may come next: by the role of the last message (None: there is none), and whether calls wait for their results.
# The admission function in `migrations/` re-checks the lines for `user` under the conversation's lock.
NEXT_ROLES: Mapping[tuple[str | None, bool], frozenset[str]] = {
    (None, False): frozenset({"system", "user"}),
    ("system", False): frozenset({"user"}),
    ("user", False): frozenset({"assistant"}),
    ("assistant", False): frozenset({"user"}),
    ("assistant", True): frozenset({"tool"}),
    ("tool", True): frozenset({"tool"}),
    ("tool", False): frozenset({"assistant"}),
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


class OutOfOrder(ValueError):
    """A message may not come next; the text says what may."""


@dataclass(frozen=True, slots=True)
class Tail:
    """The end of a conversation: the last message's role, and the calls (id → tool's name) that wait for results."""

    role: str | None = None
    pending: Mapping[str, str] = field(default_factory=dict)

    @property
    def next_roles(self) -> frozenset[str]:
        """The roles that may come next."""
        return NEXT_ROLES[self.role, bool(self.pending)]

    def followed_by(self, role: str, *, calls: Sequence[tuple[str, str]] = (), tool_call_id: str | None = None) -> Tail:
        """The end after one message more: an assistant's with these calls (id, tool's name), or the result of that one.
        Raises OutOfOrder."""
        if role not in self.next_roles:
            raise OutOfOrder(_refused(role, self.role, self.next_roles))
        if role != "tool":
            if len(dict(calls)) < len(calls):
                raise OutOfOrder("Two calls have the same id; each needs one of its own.")
            return Tail(role, dict(calls))
        if tool_call_id not in self.pending:
            waiting = ", ".join(self.pending)
            raise OutOfOrder(f"No call {tool_call_id} waits for its result; next may come: the result of {waiting}.")
        return Tail(role, {id: name for id, name in self.pending.items() if id != tool_call_id})


def refused_user(last_role: str | None) -> str:
    """Why a user's message may not come after one of this role, in words."""
    states = [roles for (role, _), roles in NEXT_ROLES.items() if role == last_role and "user" not in roles]
    return _refused("user", last_role, frozenset().union(*states))


def _refused(role: str, last_role: str | None, next_roles: Iterable[str]) -> str:
    place = f"After a message of role {last_role}" if last_role else "As the first message"
    return f"{place} one of role {role} may not come; next may come: {' or '.join(sorted(next_roles))}."


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


def standing(messages: Sequence[AnySpoken]) -> Sequence[AnySpoken]:
    """`messages` (in order) without superseded answers, and without the turns that were cancelled or failed before they
    said anything (their questions included)."""
    silent = {
        m.turn_id for m in messages if m.role == "assistant" and not m.content and m.status in (CANCELLED, FAILED)
    }
    if silent:  # an empty end may come after tools that have done something
        silent -= {m.turn_id for m in messages if m.role == "tool" or (m.role == "assistant" and m.content)}
    if silent or any(message.status == SUPERSEDED for message in messages):
        return [m for m in messages if m.status != SUPERSEDED and (m.turn_id is None or m.turn_id not in silent)]
    return messages


def visible(messages: Sequence[AnySpoken]) -> Sequence[AnySpoken]:
    """What an agent sees of `messages`: those that are standing, beginning with a user's."""
    kept = standing(messages)
    for start, message in enumerate(kept):
        if message.role == "user":
            return kept[start:] if start else kept
    return []
