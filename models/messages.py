"""Messages that are read and written without a turn: pages, and what is appended in the right order of roles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Generic, TypeVar
from uuid import UUID

import asyncpg
import msgspec

from anynode.models.database import Database
from anynode.models.rules import Tail

PAGE_BYTES_MAX: Final = 2_097_152  # of content; a page is encoded at once
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
class AppendOutcome(Generic[AnyShown]):
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
) -> AppendOutcome[AnyShown]:
    """Append all that `checked` makes of the conversation's end, or nothing. It raises where the order of roles is not
    kept, and is asked again when others were faster: what it has decided holds under the conversation's lock.
    Raises Unavailable."""
    for _ in range(MOVED_TIMES_MAX):
        rows = await database.fetch("read_tail", user_id, conversation_id)
        if not rows:
            return AppendOutcome("not_found", 0, ())
        if rows[0]["is_running"]:
            return AppendOutcome("conversation_busy", 0, ())
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
            return AppendOutcome(row["outcome"], row["last_seq"] or 0, messages)
    return AppendOutcome("conversation_busy", 0, ())


def _tail(rows: Sequence[asyncpg.Record]) -> Tail:
    """The end of a conversation whose last messages these are, from the last one that is no tool's."""
    stored = rows[0]["tool_calls"]
    calls = [] if stored is None else msgspec.json.decode(stored)
    pending: dict[str, str] = {call["id"]: call["function"]["name"] for call in calls}
    for row in rows[1:]:
        pending.pop(row["tool_call_id"], None)
    return Tail(rows[-1]["role"], pending)


@dataclass(frozen=True, slots=True)
class Page:
    """Messages, oldest first, as rows with the fields of a message. `is_first`: nothing is older. `older` and `newer`
    are the ones next to them, where there are such."""

    messages: Sequence[asyncpg.Record]
    is_first: bool
    older: asyncpg.Record | None
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
    """The newest messages, or the newest before one of them, at most `limit` and no more than 2 MiB. None: not this
    user's conversation, or no such message in it. Raises Unavailable."""
    arguments = (before, limit + (1 if before is None else 2), with_superseded, PAGE_BYTES_MAX)
    rows = await database.fetch("read_messages", user_id, conversation_id, *arguments, within_seconds=10.0)
    if not rows:
        return None
    found = [row for row in rows if row["id"] is not None]
    newer = None
    if before is not None:
        if not found or found[0]["id"] != before:
            return None
        newer = found.pop(0)
    # One more than there may be, by number or by bytes, is the one before the page.
    is_more = len(found) > limit or (len(found) > 1 and found[-1]["bytes"] > PAGE_BYTES_MAX)
    older = found.pop() if is_more else None
    is_first = older is None and (not found or found[-1]["position"] == 1)
    return Page(found[::-1], is_first, older, newer, rows[0]["system_prompt"])
