"""Messages that are read and written without a turn: pages of them, and appending in the right order of roles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Generic, TypeVar
from uuid import UUID

import asyncpg
import msgspec

from anynode.models.database import READ_BYTES_MAX, Database
from anynode.models.queries import bind
from anynode.models.rules import Tail
from anynode.models.usage import run_within_quota

MOVED_TIMES_MAX: Final = 20  # how often others may be faster before an append gives up


@dataclass(frozen=True, slots=True, kw_only=True)
class AppendedMessage:
    """A message to append; `tool_calls` and `payload`, which is its event's, are JSON."""

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
    """The outcome of an append: `appended`, `not_found` or `conversation_busy`. `last_seq` is the seq of the last
    message's event. Each message comes with what `checked` made of it for the caller."""

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
    limits: str | None = None,
) -> AppendOutcome[AnyShown]:
    """Append all messages that `checked` returns for the conversation's end, or none.

    `checked` raises where the order of roles is not kept. It is called again when another append or turn was faster, so
    its decision holds under the conversation's lock. `limits` are those of the user, as `admit` takes them. Raises
    OverQuota or Unavailable.
    """
    for _ in range(MOVED_TIMES_MAX):
        rows = await database.run(bind("read_tail", user_id=user_id, conversation_id=conversation_id))
        if not rows:
            return AppendOutcome("not_found", 0, ())
        if rows[0]["is_running"]:
            return AppendOutcome("conversation_busy", 0, ())
        messages = checked(_tail(rows))
        appended = bind(
            "append",
            user_id=user_id,
            conversation_id=conversation_id,
            position=rows[-1]["position"] or 0,
            created_at=created_at,
            ids=[message.id for message, _ in messages],
            roles=[message.role for message, _ in messages],
            contents=[message.content for message, _ in messages],
            tool_calls=[message.tool_calls for message, _ in messages],
            tool_names=[message.tool_name for message, _ in messages],
            tool_call_ids=[message.tool_call_id for message, _ in messages],
            payloads=[message.payload for message, _ in messages],
            limits=limits,
        )
        (row,) = await run_within_quota(database, user_id, appended)
        if row["outcome"] != "moved":
            return AppendOutcome(row["outcome"], row["last_seq"] or 0, messages)
    return AppendOutcome("conversation_busy", 0, ())


def _tail(rows: Sequence[asyncpg.Record]) -> Tail:
    """Return the end of a conversation from its last messages, which begin with the last one that is no tool's."""
    stored = rows[0]["tool_calls"]
    calls = [] if stored is None else msgspec.json.decode(stored)
    pending: dict[str, str] = {call["id"]: call["function"]["name"] for call in calls}
    for row in rows[1:]:
        pending.pop(row["tool_call_id"], None)
    return Tail(rows[-1]["role"], pending)


@dataclass(frozen=True, slots=True)
class Page:
    """Messages, oldest first, as rows with the fields of a message. `is_first`: no message is older.

    `older` and `newer` are the messages next to the page, None where there is none.
    """

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
    """Read the newest messages, or the newest before one of them: at most `limit`, and 2 MiB of content and calls.

    None: not this user's conversation, or there is no such message in it. Raises Unavailable.
    """
    newest = bind(
        "read_messages",
        user_id=user_id,
        conversation_id=conversation_id,
        before=before,
        messages_max=limit + (1 if before is None else 2),
        with_superseded=with_superseded,
        bytes_max=READ_BYTES_MAX,
    )
    rows = await database.run(newest, within_seconds=10.0)
    if not rows:
        return None
    found = [row for row in rows if row["id"] is not None]
    newer = None
    if before is not None:
        if not found or found[0]["id"] != before:
            return None
        newer = found.pop(0)
    # One more than there may be, by number or by bytes, is the one before the page.
    is_more = len(found) > limit or (len(found) > 1 and found[-1]["bytes"] > READ_BYTES_MAX)
    older = found.pop() if is_more else None
    is_first = older is None and (not found or found[-1]["position"] == 1)
    return Page(found[::-1], is_first, older, newer, rows[0]["system_prompt"])
