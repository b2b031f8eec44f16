"""Messages that are read and written without a turn: pages, and what is appended in the right order of roles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Generic, TypeVar
from uuid import UUID

import asyncpg
import msgspec

from models.database import Database
from models.rules import Tail

MOVED_TIMES_MAX: Final = 20  # how often others may be faster before an append gives up


@dataclass(frozen=True, slots=True, kw_only=True)
class AppendedMessage:
    """A message on its way in; `tool_calls` is JSON, and so is `payload`, that of its event."""

    id: UUID
    role: str
    content: str
    tool_calls: str | None
    tool_name: str | None
    tool_call_id: str | None
    payload: str


AnyShown = TypeVar("AnyShown")


@dataclass(frozen=True, slots=True)
class Appended(Generic[AnyShown]):
    """What became of messages: `outcome` is `appended`, `not_found` or `conversation_busy`; `last_seq` is the seq of
    the last one's event. Each comes with what `checked` made of it for whoever asked."""

    outcome: str
    last_seq: int
    messages: Sequence[tuple[AppendedMessage, AnyShown]]


async def append_messages(
    database: Database,
    user_id: str,
    conversation_id: UUID,
    *,
    created_at: datetime,
    checked: Callable[[Tail], Sequence[tuple[AppendedMessage, AnyShown]]],
) -> Appended[AnyShown]:
    """Append all that `checked` makes of the conversation's end, or nothing. It raises where the order of roles is not
    kept, and is asked again when others were faster: what it has decided holds under the conversation's lock.
    Raises Unavailable."""
    for _ in range(MOVED_TIMES_MAX):
        rows = await database.fetch("read_tail", user_id, conversation_id)
        if not rows:
            return Appended("not_found", 0, ())
        messages = checked(_tail(rows))
        (row,) = await database.fetch(
            "append",
            user_id,
            conversation_id,
            rows[-1]["position"] or 0,
            created_at,
            [message.id for message, _ in messages],
            [message.role for message, _ in messages],
            [message.content for message, _ in messages],
            [message.tool_calls for message, _ in messages],
            [message.tool_name for message, _ in messages],
            [message.tool_call_id for message, _ in messages],
            [message.payload for message, _ in messages],
        )
        if row["outcome"] != "moved":
            return Appended(row["outcome"], row["last_seq"] or 0, messages)
    return Appended("conversation_busy", 0, ())


def _tail(rows: Sequence[asyncpg.Record]) -> Tail:
    """The end of a conversation whose last messages these are, from the last one that is no tool's."""
    stored = rows[0]["tool_calls"]
    pending = {} if stored is None else calls_in(msgspec.json.decode(stored))
    for row in rows[1:]:
        pending.pop(row["tool_call_id"], None)
    return Tail(rows[-1]["role"], pending)


def calls_in(tool_calls: Sequence[Mapping[str, Mapping[str, str]]]) -> dict[str, str]:
    """The calls (id → tool's name) in the `tool_calls` of a message."""
    return {str(call["id"]): call["function"]["name"] for call in tool_calls}


@dataclass(frozen=True, slots=True)
class Page:
    """Messages, oldest first, as rows with the fields of a message. `is_first`: nothing is older. `newer` is the
    message before which they were asked for."""

    messages: Sequence[asyncpg.Record]
    is_first: bool
    newer: asyncpg.Record | None
    system_prompt: str | None


async def read_messages(
    database: Database,
    user_id: str,
    conversation_id: UUID,
    *,
    limit: int,
    before: UUID | None,
    with_superseded: bool = True,
) -> Page | None:
    """The newest messages, or the newest before one of them. None: not this user's conversation, or no such message
    in it. Raises Unavailable."""
    more = 1 if before is None else 2  # one older, to know of it, and `before` itself
    rows = await database.fetch(
        "read_messages", user_id, conversation_id, before, limit + more, with_superseded, within_seconds=10.0
    )
    if not rows:
        return None
    found = [row for row in rows if row["id"] is not None]
    newer = None
    if before is not None:
        if not found or found[0]["id"] != before:
            return None
        newer = found.pop(0)
    return Page(found[:limit][::-1], len(found) <= limit, newer, rows[0]["system_prompt"])
