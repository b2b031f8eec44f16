"""Conversations: admitting a message, reading what a person or an agent sees, and their rows as such."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import repeat
from typing import Final
from uuid import UUID

import asyncpg
from msgspec import Struct

from anynode.models.database import Database
from anynode.models.ids import as_uuid
from anynode.models.rules import COMPLETED

DELETE_SECONDS_MAX: Final = 10.0  # a conversation may have a million messages


class StoredMessage(Struct, frozen=True, gc=False):
    """A message of the history; `tool_calls` is JSON. A Struct: a turn makes as many as its history is long."""

    role: str
    content: str
    status: str = COMPLETED
    turn_id: UUID | None = None
    tool_calls: str | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A user's message on its way in, with the ids and events that it will have; those make it repeatable.

    `conversation_id` is None for a new conversation, which then gets `new_conversation_id` and `title`; with a
    `chat_id`, which is the client's own id of it, only where there is none yet.
    `message_created` and `turn_started` are the payloads of its two events, JSON.
    """

    user_id: str
    conversation_id: UUID | None
    new_conversation_id: UUID
    title: str
    message_id: UUID
    client_id: str
    content: str
    created_at: datetime
    turn_id: UUID
    message_created: str
    turn_started: str
    chat_id: str | None = None


@dataclass(frozen=True, slots=True)
class Admission:
    """What became of a question.

    `outcome` is `admitted`, `repeated`, `not_found`, `conversation_busy`, `role_order`, `message_id_taken` or, where an
    old question was to be answered again, `not_last`. `turn_id` is its turn, or the one that keeps the conversation
    busy. `first_seq` is the seq of the turn's first event, None when its events have been deleted; `last_role` is the
    role that stands in the way of `role_order`; `client_id` that of a question that is answered again.
    """

    outcome: str
    conversation_id: UUID
    turn_id: UUID | None = None
    first_seq: int | None = None
    last_role: str | None = None
    system_prompt: str | None = None
    history: Sequence[StoredMessage] = ()
    client_id: str | None = None


async def admit(
    database: Database,
    question: Question,
    *,
    node: str,
    lease_seconds: float,
    history_messages_max: int,
    on_sent: Callable[[], object],
) -> Admission:
    """One transaction in one round trip; the lease runs from after `on_sent` is called. Raises Unavailable."""
    named: list[object]
    if question.chat_id is None:
        statement, named = "admit", [question.conversation_id]
    else:
        statement, named = "admit_to_chat", [question.chat_id, as_uuid(question.chat_id)]
    rows = await database.fetch(
        statement,
        question.user_id,
        *named,
        question.new_conversation_id,
        question.title,
        question.message_id,
        question.client_id,
        question.content,
        question.created_at,
        question.turn_id,
        node,
        lease_seconds,
        question.message_created,
        question.turn_started,
        history_messages_max,
        on_sent=on_sent,
    )
    return _admission(rows[0])


async def regenerate(
    database: Database,
    user_id: str,
    conversation_id: UUID,
    client_id: str | None,
    *,
    turn_id: UUID,
    created_at: datetime,
    node: str,
    lease_seconds: float,
    history_messages_max: int,
    on_sent: Callable[[], object],
) -> Admission:
    """Admit a turn that answers the last question again (`client_id`: only if that is its id). Raises Unavailable."""
    arguments = (user_id, conversation_id, client_id, turn_id, created_at, node, lease_seconds, history_messages_max)
    rows = await database.fetch("regenerate", *arguments, on_sent=on_sent)
    return _admission(rows[0])


def _admission(row: asyncpg.Record) -> Admission:
    return Admission(
        outcome=row["outcome"],
        conversation_id=row["conversation_id"],
        turn_id=row["turn_id"],
        first_seq=row["first_seq"],
        last_role=row["last_role"],
        system_prompt=row["system_prompt"],
        history=history_of(row),
        client_id=row.get("client_id"),
    )


async def read_history(
    database: Database, conversation_id: UUID, *, messages_max: int
) -> tuple[str | None, list[StoredMessage]] | None:
    """The system prompt and the newest messages, whoever's they are. None: the conversation is deleted. Raises
    Unavailable."""
    rows = await database.fetch("history", conversation_id, messages_max)
    return (rows[0]["system_prompt"], history_of(rows[0])) if rows else None


def history_of(row: asyncpg.Record) -> list[StoredMessage]:
    """The history in a row that has the columns of `anynode_history`, oldest message first."""
    roles: Sequence[str] = row["roles"] or ()
    optional = [row[name] for name in ("statuses", "turn_ids", "tool_calls", "tool_names", "tool_call_ids")]
    if all(column is None for column in optional):
        messages = [StoredMessage(role, content) for role, content in zip(roles, row["contents"] or (), strict=True)]
    else:
        statuses, *others = optional
        columns = [statuses or repeat(COMPLETED), *(column or repeat(None) for column in others)]
        messages = [StoredMessage(*values) for values in zip(roles, row["contents"], *columns, strict=False)]
    messages.reverse()  # the newest come first
    return messages


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A conversation at one instant; `messages` are rows with the fields of a message, oldest first."""

    seq: int
    running_turn_id: UUID | None
    running_text: str
    messages: Sequence[asyncpg.Record]


async def read_snapshot(
    database: Database, user_id: str, conversation_id: UUID, *, messages_max: int
) -> Snapshot | None:
    """The newest messages and the running turn. None: not this user's conversation."""
    rows = await database.fetch("snapshot", user_id, conversation_id, messages_max)
    if not rows:
        return None
    head = rows[0]
    messages = [row for row in rows if row["id"] is not None]
    return Snapshot(head["seq"], head["running_turn_id"], head["running_text"] or "", messages)


async def create_conversation(
    database: Database,
    user_id: str,
    conversation_id: UUID,
    *,
    title: str | None,
    system_prompt: str | None,
    metadata: str,
    created_at: datetime,
) -> asyncpg.Record:
    """Make a conversation; `metadata` is JSON. Returns its row. Raises Unavailable."""
    arguments = (user_id, conversation_id, title, system_prompt, metadata, created_at)
    (row,) = await database.fetch("create_conversation", *arguments)
    return row


async def read_conversation(database: Database, user_id: str, conversation_id: UUID) -> asyncpg.Record | None:
    """Its row. None: not this user's conversation. Raises Unavailable."""
    rows = await database.fetch("read_conversation", user_id, conversation_id)
    return rows[0] if rows else None


async def list_conversations(
    database: Database,
    user_id: str,
    *,
    limit: int,
    skip: int = 0,
    before: tuple[datetime, UUID] | None = None,
    search: str | None = None,
) -> Sequence[asyncpg.Record]:
    """Rows of conversations, newest activity first, past so many behind a place (updated_at, id), or from the top; with
    `search` those whose titles contain it, in whatever case. Raises Unavailable."""
    if before is not None:
        return await database.fetch("list_conversations_before", user_id, limit, skip, search, *before)
    return await database.fetch("list_conversations", user_id, limit, skip, search)


async def update_conversation(
    database: Database, user_id: str, conversation_id: UUID, changes: Mapping[str, str | None]
) -> asyncpg.Record | None:
    """Set what `changes` has of title, system_prompt and metadata (JSON). Returns the row. None: not this user's
    conversation. Raises Unavailable."""
    arguments: list[object] = []
    for name in ("title", "system_prompt", "metadata"):
        arguments += [name in changes, changes.get(name)]
    rows = await database.fetch("update_conversation", user_id, conversation_id, *arguments)
    return rows[0] if rows else None


async def delete_conversation(database: Database, user_id: str, conversation_id: UUID, *, is_forced: bool) -> str:
    """Delete it with all that belongs to it; `is_forced`: also while a turn runs. Returns `deleted`,
    `conversation_busy` or `not_found`. Raises Unavailable."""
    attempts = 0

    def count() -> None:
        nonlocal attempts
        attempts += 1

    (row,) = await database.fetch(
        "delete_conversation",
        user_id,
        conversation_id,
        is_forced,
        within_seconds=DELETE_SECONDS_MAX,
        attempt_seconds=DELETE_SECONDS_MAX,
        on_sent=count,
    )
    # Where an attempt's answer was lost, it may be the one that deleted.
    is_deleted = row["outcome"] == "deleted" or (row["outcome"] == "not_found" and attempts > 1)
    return "deleted" if is_deleted else str(row["outcome"])
