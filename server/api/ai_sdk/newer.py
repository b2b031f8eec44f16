"""Waiting until a chat has something newer than what a client shows of it, whoever begins it, on whatever node."""

from __future__ import annotations

import logging
from contextlib import aclosing
from uuid import UUID

from anynode.models.client_chats import ChatEnd, find_chat_end
from anynode.models.database import Database, Unavailable
from anynode.server.engine.follow import Follows
from anynode.server.errors import DatabaseUnavailable

logger = logging.getLogger("anynode.follow")


async def end_of_chat(database: Database, user_id: str, chat_id: str) -> ChatEnd | None:
    """The end of a chat, None where there is none. Raises DatabaseUnavailable."""
    try:
        return await find_chat_end(database, user_id, chat_id)
    except Unavailable as error:
        raise DatabaseUnavailable from error


async def something_newer(follows: Follows, user_id: str, conversation_id: UUID, last_seq: int) -> None:
    """Wait for it, also while Postgres is away, in a chat in which no turn ran at `last_seq`: then the next event, of
    whatever type, is a message's or begins a turn. Raises NotFound where the conversation is deleted meanwhile."""
    while True:
        try:
            async with aclosing(follows.follow(user_id, conversation_id, last_seq, is_own=True)) as steps:
                await anext(steps)  # a snapshot is news too: the journal has lost what the client shows
                return
        except Unavailable as error:
            logger.warning("conversation %s is waited for on when Postgres is back: %s", conversation_id, error)
