"""Conversations and their messages: admitting a message, reading what a person or an agent sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import repeat
from uuid import UUID

import asyncpg
from msgspec import Struct

from models.database import Database
from models.rules import COMPLETED


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

    `conversation_id` is None for a new conversation, which then gets `new_conversation_id` and `title`.
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
    rows = await database.fetch(
        "admit",
        question.user_id,
        question.conversation_id,
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
) -> tuple[str | None, list[StoredMessage]]:
    """The system prompt and the newest messages, whoever's they are. Raises Unavailable."""
    rows = await database.fetch("history", conversation_id, messages_max)
    return (rows[0]["system_prompt"], history_of(rows[0])) if rows else (None, [])


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


async def list_conversations(database: Database, user_id: str, *, limit: int, skip: int) -> Sequence[asyncpg.Record]:
    """Newest activity first: id, title, created_at, updated_at."""
    return await database.fetch("list_conversations", user_id, limit, skip)
