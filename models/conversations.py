"""Conversations: reading a snapshot, and their rows: made, set, deleted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

import asyncpg

from anynode.models.database import READ_BYTES_MAX, Database, Unavailable
from anynode.models.queries import bind
from anynode.models.usage import run_within_quota

CREATE_TIMES_MAX: Final = 20  # how often others may make and delete the same conversation meanwhile
DELETE_SECONDS_MAX: Final = 10.0  # a conversation may have a million messages


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A conversation at one instant; `messages` are rows with the fields of a message, oldest first. `has_older`: there
    are older messages, which are left out."""

    seq: int
    running_turn_id: UUID | None
    running_text: str
    messages: Sequence[asyncpg.Record]
    has_older: bool = False


async def read_snapshot(
    database: Database, user_id: str, conversation_id: UUID, *, messages_max: int
) -> Snapshot | None:
    """Read the newest messages, at most `messages_max` and 2 MiB, and the running turn. None: not this user's
    conversation. Raises Unavailable."""
    snapshot = bind(
        "snapshot",
        user_id=user_id,
        conversation_id=conversation_id,
        messages_max=messages_max,
        bytes_max=READ_BYTES_MAX,
    )
    rows = await database.run(snapshot)
    if not rows:
        return None
    head = rows[0]
    messages = [row for row in rows if row["id"] is not None]
    has_older = bool(messages) and messages[0]["position"] > 1
    return Snapshot(head["seq"], head["running_turn_id"], head["running_text"] or "", messages, has_older)


async def create_conversation(
    database: Database,
    user_id: str,
    conversation_id: UUID,
    *,
    title: str | None,
    system_prompt: str | None,
    metadata: str,
    created_at: datetime,
    limits: str | None = None,
) -> asyncpg.Record:
    """Make a conversation; `metadata` is JSON, and `limits` are those of the user, as `admit` takes them. Returns its
    row. Raises OverQuota or Unavailable."""
    created = bind(
        "create_conversation",
        user_id=user_id,
        conversation_id=conversation_id,
        title=title,
        system_prompt=system_prompt,
        metadata=metadata,
        created_at=created_at,
        bytes=_bytes_of(system_prompt, metadata),
        limits=limits,
    )
    (row,) = await run_within_quota(database, user_id, created)
    return row


async def get_or_create_conversation(
    database: Database,
    user_id: str,
    *,
    conversation_id: UUID,
    client_id: str | None,
    wanted_id: UUID | None,
    title: str | None,
    system_prompt: str | None,
    metadata: str,
    created_at: datetime,
    limits: str | None = None,
) -> tuple[asyncpg.Record | None, bool]:
    """Find the user's conversation by an id, or make it. Returns its row, and whether this call has made it.

    `client_id` is looked up first, as the client's own id of a conversation, then `wanted_id` as ours. `wanted_id` is
    the same text as a UUID, None if it is no UUID. A conversation that is there stays as it is. A new one is made under
    `conversation_id`, which must be new, and has the `client_id`.

    With a `wanted_id` and no `client_id` it is made under `wanted_id` itself. The row is None if another user has that
    id. Repeat the call then, with the text as `client_id`.

    Many calls at once, on any nodes, return one conversation, and one of them has made it. `limits` are those of the
    user, as `admit` takes them. Raises OverQuota or Unavailable.
    """
    new_id = wanted_id if client_id is None and wanted_id is not None else conversation_id
    attempts = 0

    def count() -> None:
        nonlocal attempts
        attempts += 1

    statement = bind(
        "get_or_create_conversation",
        user_id=user_id,
        client_id=client_id,
        wanted_id=wanted_id,
        new_id=new_id,
        title=title,
        system_prompt=system_prompt,
        metadata=metadata,
        created_at=created_at,
        bytes=_bytes_of(system_prompt, metadata),
        limits=limits,
    )
    for answers in range(1, CREATE_TIMES_MAX + 1):
        (row,) = await run_within_quota(database, user_id, statement, on_sent=count)
        if row["id"] is not None:
            # An earlier attempt, whose answer was lost, may be the one that made it.
            is_mine = attempts > answers and (row["id"], row["created_at"]) == (new_id, created_at)
            return row, row["is_new"] or is_mine
        if row["is_taken"]:
            return None, False
    raise Unavailable("the conversation is being made and deleted all the time")


async def read_conversation(database: Database, user_id: str, conversation_id: UUID) -> asyncpg.Record | None:
    """Return the row of a conversation. None: not this user's conversation. Raises Unavailable."""
    rows = await database.run(bind("read_conversation", user_id=user_id, conversation_id=conversation_id))
    return rows[0] if rows else None


def _bytes_of(*texts: str | None) -> int:
    return sum(len(text.encode()) for text in texts if text is not None)


async def update_conversation(
    database: Database,
    user_id: str,
    conversation_id: UUID,
    changes: Mapping[str, str | None],
    *,
    limits: str | None = None,
) -> asyncpg.Record | None:
    """Set those of title, system_prompt and metadata (JSON) that `changes` has. `limits` are those of the user, as
    `admit` takes them. Returns the row. None: not this user's conversation. Raises OverQuota or Unavailable."""
    updated = bind(
        "update_conversation",
        user_id=user_id,
        conversation_id=conversation_id,
        sets_title="title" in changes,
        title=changes.get("title"),
        sets_system_prompt="system_prompt" in changes,
        system_prompt=changes.get("system_prompt"),
        sets_metadata="metadata" in changes,
        metadata=changes.get("metadata"),
        bytes=_bytes_of(changes.get("system_prompt"), changes.get("metadata")),
        limits=limits,
    )
    rows = await run_within_quota(database, user_id, updated)
    return rows[0] if rows else None


async def delete_conversation(database: Database, user_id: str, conversation_id: UUID, *, is_forced: bool) -> str:
    """Delete a conversation with all that belongs to it; while a turn runs only if `is_forced`. Returns `deleted`,
    `conversation_busy` or `not_found`. Raises Unavailable."""
    attempts = 0

    def count() -> None:
        nonlocal attempts
        attempts += 1

    (row,) = await database.run(
        bind("delete_conversation", user_id=user_id, conversation_id=conversation_id, is_forced=is_forced),
        within_seconds=DELETE_SECONDS_MAX,
        attempt_seconds=DELETE_SECONDS_MAX,
        on_sent=count,
    )
    # An earlier attempt, whose answer was lost, may be the one that deleted.
    is_deleted = row["outcome"] == "deleted" or (row["outcome"] == "not_found" and attempts > 1)
    return "deleted" if is_deleted else str(row["outcome"])
