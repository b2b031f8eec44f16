"""The rules of a conversation as data: which role may come next, how a turn ends, which messages an agent sees."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

# The roles that may come next, by the role of the last message (None: there is none) and whether calls are pending.
# `functions/admit_message.sql` checks the lines for `user` again, under the conversation's lock.
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

# The event that ends a turn, by the status that the turn then has. An ended turn never changes again.
TERMINAL_EVENTS: Mapping[str, str] = {
    COMPLETED: "turn.completed",
    CANCELLED: "turn.cancelled",
    FAILED: "turn.failed",
}
TERMINAL_TYPES: frozenset[str] = frozenset(TERMINAL_EVENTS.values())


class OutOfOrder(ValueError):
    """A message cannot come next; the text says which can."""


@dataclass(frozen=True, slots=True)
class Tail:
    """The end of a conversation: the last message's role, and the calls (id → tool's name) that have no result yet."""

    role: str | None = None
    pending: Mapping[str, str] = field(default_factory=dict)

    @property
    def next_roles(self) -> frozenset[str]:
        """The roles that may come next."""
        return NEXT_ROLES[self.role, bool(self.pending)]

    def check(self, role: str) -> None:
        """Raise OutOfOrder unless a message of this role may come next."""
        if role not in self.next_roles:
            raise OutOfOrder(_refused(role, self.role, self.next_roles))

    def followed_by(self, role: str, *, calls: Sequence[tuple[str, str]] = (), tool_call_id: str | None = None) -> Tail:
        """Return the end after one more message: one with `calls` (id, tool's name), or the result of `tool_call_id`.

        Raises OutOfOrder.
        """
        self.check(role)
        if role != "tool":
            if len(dict(calls)) < len(calls):
                raise OutOfOrder("Two calls have the same id; give each its own.")
            return Tail(role, dict(calls))
        if tool_call_id not in self.pending:
            raise OutOfOrder(f"No call {tool_call_id} is pending; pending: {', '.join(self.pending)}.")
        return Tail(role, {id: name for id, name in self.pending.items() if id != tool_call_id})


def refused_user(last_role: str | None) -> str:
    """Return why a user message cannot follow a message of this role, in words."""
    states = [roles for (role, _), roles in NEXT_ROLES.items() if role == last_role and "user" not in roles]
    return _refused("user", last_role, frozenset().union(*states))


def _refused(role: str, last_role: str | None, next_roles: Iterable[str]) -> str:
    place = f"follow {_message(last_role)}" if last_role else "come first"
    refused = _message(role)
    return f"{refused[0].upper()}{refused[1:]} cannot {place}; expected: {' or '.join(sorted(next_roles))}."


def _message(role: str) -> str:
    article = "an" if role == "assistant" else "a"
    return f"{article} {role} message"


class Spoken(Protocol):
    """The fields of a message that decide whether an agent sees it."""

    @property
    def role(self) -> str: ...
    @property
    def content(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def turn_id(self) -> object: ...


AnySpoken = TypeVar("AnySpoken", bound=Spoken)


def kept(messages: Sequence[AnySpoken]) -> Sequence[AnySpoken]:
    """Return `messages` (in order) without superseded answers, and without the turns that were cancelled or failed
    before they said anything (their questions included)."""
    silent = {
        m.turn_id for m in messages if m.role == "assistant" and not m.content and m.status in (CANCELLED, FAILED)
    }
    if silent:  # an empty end may come after tools that have done something
        silent -= {m.turn_id for m in messages if m.role == "tool" or (m.role == "assistant" and m.content)}
    if silent or any(message.status == SUPERSEDED for message in messages):
        return [m for m in messages if m.status != SUPERSEDED and (m.turn_id is None or m.turn_id not in silent)]
    return messages


def visible(messages: Sequence[AnySpoken]) -> Sequence[AnySpoken]:
    """Return the messages that an agent sees: those that are `kept`, from the first user message on."""
    seen = kept(messages)
    for start, message in enumerate(seen):
        if message.role == "user":
            return seen[start:] if start else seen
    return []
