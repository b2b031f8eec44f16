"""Chats: conversations as outside clients know them, by ids of their own."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from anynode.models.database import Database
from anynode.models.ids import as_uuid
from anynode.models.queries import bind
from anynode.models.turns import TurnRef


@dataclass(frozen=True, slots=True)
class Chat:
    """The conversation that a chat's id means, and the turn that runs in it or answered last, None without a turn."""

    conversation_id: UUID
    turn: TurnRef | None


async def find_chat(database: Database, user_id: str, client_chat_id: str) -> Chat | None:
    """Find the user's conversation by the client's own id of it, or else by ours. None: there is none.

    Raises Unavailable.
    """
    found = bind("find_chat", user_id=user_id, client_chat_id=client_chat_id, conversation_id=as_uuid(client_chat_id))
    rows = await database.run(found)
    if not rows:
        return None
    row = rows[0]
    turn_id = row["turn_id"]
    turn = None if turn_id is None else TurnRef(user_id, row["conversation_id"], turn_id, row["first_seq"])
    return Chat(row["conversation_id"], turn)


async def find_conversation(
    database: Database, user_id: str, client_id: str, conversation_id: UUID | None
) -> UUID | None:
    """Return our id of the user's conversation with the id `conversation_id`, or else with this client's own id.

    None: there is none. Raises Unavailable.
    """
    found = bind("find_conversation", user_id=user_id, client_id=client_id, conversation_id=conversation_id)
    (row,) = await database.run(found)
    id: UUID | None = row["id"]
    return id


@dataclass(frozen=True, slots=True)
class ChatEnd:
    """The end of a chat, at `last_seq` of its journal where no turn runs.

    `last_id` is the id under which clients show the last message: a question's is the client's, an answer's is that of
    its turn. None: the chat has no message.
    """

    conversation_id: UUID
    last_seq: int
    last_id: str | None
    is_running: bool


async def find_chat_end(database: Database, user_id: str, client_chat_id: str) -> ChatEnd | None:
    """Find the end of the chat that `find_chat` finds, all of one instant. None: there is none. Raises Unavailable."""
    found = bind(
        "find_chat_end", user_id=user_id, client_chat_id=client_chat_id, conversation_id=as_uuid(client_chat_id)
    )
    rows = await database.run(found)
    return ChatEnd(**rows[0]) if rows else None


@dataclass(frozen=True, slots=True)
class Sent:
    """A message that the user has sent: its text, whether it was appended without asking for an answer, and whether it
    is the last question of its conversation."""

    conversation_id: UUID
    content: str
    is_appended: bool
    is_last: bool


async def find_sent(database: Database, user_id: str, client_message_id: str) -> Sent | None:
    """Find a message of the user by the client's own id of it, or by ours where it has no such id. None: there is none.

    Raises Unavailable.
    """
    found = bind(
        "find_sent",
        user_id=user_id,
        client_message_id=client_message_id,
        message_id=as_uuid(client_message_id),
    )
    rows = await database.run(found)
    return Sent(**rows[0]) if rows else None
