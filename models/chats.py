"""Chats: conversations as outside clients know them, by ids of their own."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from anynode.models.database import Database
from anynode.models.ids import as_uuid
from anynode.models.turns import TurnRef


@dataclass(frozen=True, slots=True)
class Chat:
    """The conversation behind a chat's id, and the turn that runs in it or has answered last, if there is one."""

    conversation_id: UUID
    turn: TurnRef | None


async def find_chat(database: Database, user_id: str, chat_id: str) -> Chat | None:
    """The user's conversation with this id, be it the client's own or the one that it has here. None: there is none.
    Raises Unavailable."""
    rows = await database.fetch("find_chat", user_id, chat_id, as_uuid(chat_id))
    if not rows:
        return None
    row = rows[0]
    turn_id = row["turn_id"]
    turn = None if turn_id is None else TurnRef(user_id, row["conversation_id"], turn_id, row["first_seq"])
    return Chat(row["conversation_id"], turn)


@dataclass(frozen=True, slots=True)
class ChatEnd:
    """What a chat ends with, at `last_seq` of its journal where no turn runs: `last_id` is that of its last message, as
    clients show it (a user's message under its client's id, an answer under its turn's), None where it has none."""

    conversation_id: UUID
    last_seq: int
    last_id: str | None
    is_running: bool


async def find_chat_end(database: Database, user_id: str, chat_id: str) -> ChatEnd | None:
    """The end of the chat with this id, as for `find_chat`, all of one instant. None: there is none. Raises
    Unavailable."""
    rows = await database.fetch("find_chat_end", user_id, chat_id, as_uuid(chat_id))
    return ChatEnd(**rows[0]) if rows else None


@dataclass(frozen=True, slots=True)
class Sent:
    """A message that the user has sent: its text, whether it was appended without asking for an answer, and whether it
    is the last question of its conversation."""

    conversation_id: UUID
    content: str
    is_appended: bool
    is_last: bool


async def find_sent(database: Database, user_id: str, message_id: str) -> Sent | None:
    """What the user has sent under an id, the client's own or, if that has none, the one that it has here. None:
    nothing. Raises Unavailable."""
    rows = await database.fetch("find_sent", user_id, message_id, as_uuid(message_id))
    return Sent(**rows[0]) if rows else None
