"""Conversations: admitting a message, reading a history or a snapshot, and their rows: made, set, deleted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import repeat
from typing import Final, TypedDict, Unpack
from uuid import UUID

import asyncpg
from msgspec import Struct

from anynode.models.database import READ_BYTES_MAX, Database, Unavailable
from anynode.models.ids import as_uuid
from anynode.models.queries import bind
from anynode.models.rules import COMPLETED

CREATE_TIMES_MAX: Final = 20  # how often others may make and delete the same conversation meanwhile
DELETE_SECONDS_MAX: Final = 10.0  # a conversation may have a million messages


class StoredMessage(Struct, frozen=True, gc=False):
    """A message of the history; `tool_calls` is JSON. It is a Struct because every turn makes one for each message."""

    role: str
    content: str
    status: str = COMPLETED
    turn_id: UUID | None = None
    tool_calls: str | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A user's message to admit, with the ids and events that it will have. They make the admission repeatable.

    `client_message_id` and `client_chat_id` are ids that the client chose; the other ids are ours. Without a
    `conversation_id` a new conversation gets `new_conversation_id` and `title`; with a `client_chat_id` it does so only
    where the client's chat has no conversation yet. `message_created` and `turn_started` are the payloads of the two
    events, JSON.
    """

    user_id: str
    conversation_id: UUID | None
    new_conversation_id: UUID
    title: str
    message_id: UUID
    client_message_id: str
    content: str
    created_at: datetime
    turn_id: UUID
    message_created: str
    turn_started: str
    client_chat_id: str | None = None


@dataclass(frozen=True, slots=True)
class Admission:
    """The outcome of a question.

    `outcome` is `admitted`, `repeated`, `not_found`, `conversation_busy`, `role_order`, `message_id_taken` or, where a
    question was to be answered again, `not_last`, or `answered` where the last message was to be answered and is no
    question. `turn_id` is the question's turn, or the turn that keeps the conversation busy. `first_seq` is the seq of
    the turn's first event, None when its events have been deleted. With `role_order`, `last_role` is the role of the
    last message. `client_message_id` is the id of a question that was there before its turn.
    """

    outcome: str
    conversation_id: UUID
    turn_id: UUID | None = None
    first_seq: int | None = None
    last_role: str | None = None
    system_prompt: str | None = None
    history: Sequence[StoredMessage] = ()
    client_message_id: str | None = None


async def admit(
    database: Database,
    question: Question,
    *,
    node: str,
    lease_seconds: float,
    history_messages_max: int,
    on_sent: Callable[[], object],
) -> Admission:
    """Admit a user's message and begin its turn, in one transaction and one round trip.

    The lease runs from after `on_sent` is called. Raises Unavailable.
    """
    arguments = {
        "user_id": question.user_id,
        "conversation_id": question.conversation_id,
        "new_conversation_id": question.new_conversation_id,
        "title": question.title,
        "message_id": question.message_id,
        "client_message_id": question.client_message_id,
        "content": question.content,
        "created_at": question.created_at,
        "turn_id": question.turn_id,
        "node": node,
        "lease_seconds": lease_seconds,
        "message_created": question.message_created,
        "turn_started": question.turn_started,
        "history_messages_max": history_messages_max,
    }
    client_chat_id = question.client_chat_id
    if client_chat_id is None:
        admitted = bind("admit", **arguments)
    else:
        arguments["conversation_id"] = as_uuid(client_chat_id)
        admitted = bind("admit_to_chat", client_chat_id=client_chat_id, **arguments)
    rows = await database.run(admitted, on_sent=on_sent)
    return _admission(rows[0])


class AnswerTerms(TypedDict):
    """The turn that is to answer a conversation's last question, and the lease of the node that runs it."""

    turn_id: UUID
    created_at: datetime
    node: str
    lease_seconds: float
    history_messages_max: int


async def regenerate(
    database: Database,
    user_id: str,
    conversation_id: UUID,
    client_message_id: str | None,
    *,
    on_sent: Callable[[], object],
    **terms: Unpack[AnswerTerms],
) -> Admission:
    """Begin a turn that answers the last question again; with `client_message_id`, only if that is its id.

    The lease runs from after `on_sent` is called. Raises Unavailable.
    """
    again = bind(
        "regenerate", user_id=user_id, conversation_id=conversation_id, client_message_id=client_message_id, **terms
    )
    return _admission((await database.run(again, on_sent=on_sent))[0])


async def answer(
    database: Database,
    user_id: str,
    conversation_id: UUID,
    *,
    on_sent: Callable[[], object],
    **terms: Unpack[AnswerTerms],
) -> Admission:
    """Begin a turn that answers the last message, a question that has no answer yet.

    The lease runs from after `on_sent` is called. Raises Unavailable.
    """
    first = bind("answer", user_id=user_id, conversation_id=conversation_id, **terms)
    return _admission((await database.run(first, on_sent=on_sent))[0])


def _admission(row: asyncpg.Record) -> Admission:
    return Admission(
        outcome=row["outcome"],
        conversation_id=row["conversation_id"],
        turn_id=row["turn_id"],
        first_seq=row["first_seq"],
        last_role=row["last_role"],
        system_prompt=row["system_prompt"],
        history=decode_history(row),
        client_message_id=row.get("client_id"),
    )


async def read_history(
    database: Database, conversation_id: UUID, *, messages_max: int
) -> tuple[str | None, list[StoredMessage]] | None:
    """Read the system prompt and the newest messages of any user's conversation. None: it is deleted.

    Raises Unavailable.
    """
    rows = await database.run(bind("history", conversation_id=conversation_id, messages_max=messages_max))
    return (rows[0]["system_prompt"], decode_history(rows[0])) if rows else None


def decode_history(row: asyncpg.Record) -> list[StoredMessage]:
    """Return the history in a row that has the columns of `anynode_history`, oldest message first."""
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
) -> asyncpg.Record:
    """Make a conversation; `metadata` is JSON. Returns its row. Raises Unavailable."""
    created = bind(
        "create_conversation",
        user_id=user_id,
        conversation_id=conversation_id,
        title=title,
        system_prompt=system_prompt,
        metadata=metadata,
        created_at=created_at,
    )
    (row,) = await database.run(created)
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
) -> tuple[asyncpg.Record | None, bool]:
    """Find the user's conversation by an id, or make it. Returns its row, and whether this call has made it.

    `client_id` is looked up first, as the client's own id of a conversation, then `wanted_id` as ours. `wanted_id` is
    the same text as a UUID, None if it is no UUID. A conversation that is there stays as it is. A new one is made under
    `conversation_id`, which must be new, and has the `client_id`.

    With a `wanted_id` and no `client_id` it is made under `wanted_id` itself. The row is None if another user has that
    id. Repeat the call then, with the text as `client_id`.

    Many calls at once, on any nodes, return one conversation, and one of them has made it. Raises Unavailable.
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
    )
    for answers in range(1, CREATE_TIMES_MAX + 1):
        (row,) = await database.run(statement, on_sent=count)
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


async def update_conversation(
    database: Database, user_id: str, conversation_id: UUID, changes: Mapping[str, str | None]
) -> asyncpg.Record | None:
    """Set those of title, system_prompt and metadata (JSON) that `changes` has. Returns the row. None: not this user's
    conversation. Raises Unavailable."""
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
    )
    rows = await database.run(updated)
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
