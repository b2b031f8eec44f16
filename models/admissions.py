"""Admissions: a question, or an answer that is asked for again, and the turn that begins with it; and histories."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import repeat
from typing import TypedDict, Unpack
from uuid import UUID

import asyncpg
from msgspec import Struct

from anynode.models.database import Database
from anynode.models.ids import as_uuid
from anynode.models.queries import bind
from anynode.models.rules import COMPLETED
from anynode.models.usage import ReachedLimit, reached_limit


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
    question; or `rate_limited`, with the `reached` limit.

    `turn_id` is the question's turn, or the turn that keeps the conversation busy. `first_seq` is the seq of the turn's
    first event, None when its events have been deleted. With `role_order`, `last_role` is the role of the last message.
    `client_message_id` is the id of a question that was there before its turn.
    """

    outcome: str
    conversation_id: UUID
    turn_id: UUID | None = None
    first_seq: int | None = None
    last_role: str | None = None
    system_prompt: str | None = None
    history: Sequence[StoredMessage] = ()
    client_message_id: str | None = None
    history_is_cut: bool = False  # its bytes have left messages out
    reached: ReachedLimit | None = None


async def admit(
    database: Database,
    question: Question,
    *,
    node: str,
    lease_seconds: float,
    history_messages_max: int,
    limits: str | None = None,
    on_sent: Callable[[], object],
) -> Admission:
    """Admit a user's message and begin its turn, in one transaction and one round trip.

    `limits` are those of the user: a JSON object by the names of their settings; None: there are none.

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
        "limits": limits,
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
    """The turn that is to answer a conversation's last question, the lease of the node that runs it, and the user's
    limits, as `admit` takes them."""

    turn_id: UUID
    created_at: datetime
    node: str
    lease_seconds: float
    history_messages_max: int
    limits: str | None


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
        history_is_cut=bool(row["is_cut"]),
        reached=reached_limit(row),
    )


async def read_history(
    database: Database, conversation_id: UUID, *, messages_max: int
) -> tuple[str | None, list[StoredMessage], bool] | None:
    """Read the system prompt and the newest messages of any user's conversation, and whether their bytes have left
    others out. None: it is deleted.

    Raises Unavailable.
    """
    rows = await database.run(bind("history", conversation_id=conversation_id, messages_max=messages_max))
    return (rows[0]["system_prompt"], decode_history(rows[0]), bool(rows[0]["is_cut"])) if rows else None


def decode_history(row: asyncpg.Record) -> list[StoredMessage]:
    """Return the history in a row that has the columns of `anynode_read_history`, oldest message first."""
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
