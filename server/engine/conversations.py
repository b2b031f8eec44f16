"""Conversations and messages, as the APIs read and write them apart from running turns."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

import asyncpg
from msgspec import Raw

from anynode.models.client_chats import Chat, ChatEnd, Sent, find_chat, find_chat_end, find_conversation, find_sent
from anynode.models.conversations import (
    Snapshot,
    create_conversation,
    get_or_create_conversation,
    read_conversation,
    update_conversation,
)
from anynode.models.database import Database
from anynode.models.ids import as_uuid, uuid7
from anynode.models.listing import Place, list_conversations
from anynode.models.messages import Page, append_messages, read_messages
from anynode.models.turns import TurnRef, find_turn, read_usage
from anynode.server.engine.admission import appended_of
from anynode.server.engine.postgres_errors import over_quota_as_client_error, unavailable_as_client_error
from anynode.server.engine.user_limits import limits_in_force
from anynode.server.errors import ConversationBusy, NotFound
from anynode.server.limits import UserLimits
from anynode.server.protocol.bodies import AnyPostedMessage, Conversation
from anynode.server.protocol.frames import Message
from anynode.server.settings import Settings

__all__ = ["Chat", "ChatEnd", "Conversations", "Page", "Sent", "Snapshot", "TurnRef"]


@dataclass(frozen=True, slots=True)
class ListedConversations:
    """A page of the list; see `ConversationPage` in `models.listing`."""

    conversations: Sequence[Conversation]
    next_place: Place | None
    is_searched_to_its_end: bool


class Conversations:
    """The conversations of all users.

    Every method is given the user, and finds nothing of anybody else's. All raise DatabaseUnavailable where Postgres
    does not answer, and NotFound where they say so.
    """

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings = settings
        self._database = database

    async def create(
        self,
        user_id: str,
        *,
        title: str | None,
        system_prompt: str | None,
        metadata: str | None,
        limits: UserLimits | None = None,
    ) -> Conversation:
        """Make a conversation; `metadata` is a JSON object as text. `limits` are those of the user; code in this
        process has none. Raises RateLimited."""
        in_force = limits_in_force(limits, self._settings)
        with unavailable_as_client_error(), over_quota_as_client_error(in_force):
            row = await create_conversation(
                self._database,
                user_id,
                uuid7(),
                title=title,
                system_prompt=system_prompt,
                metadata=metadata or "{}",
                created_at=datetime.now(UTC),
                limits=in_force.json,
            )
        return _conversation(row)

    async def get_or_create(
        self,
        user_id: str,
        client_id: str,
        *,
        title: str | None,
        system_prompt: str | None,
        metadata: str | None,
        limits: UserLimits | None = None,
    ) -> tuple[Conversation, bool]:
        """Return the conversation with this id, the client's own or ours, or make one under the client's id. The bool
        says whether it was made. One that was there stays as it is. `metadata` and `limits`: see `create`. Raises
        RateLimited."""
        in_force = limits_in_force(limits, self._settings)
        with unavailable_as_client_error(), over_quota_as_client_error(in_force):
            row, is_new = await get_or_create_conversation(
                self._database,
                user_id,
                conversation_id=uuid7(),
                client_id=client_id,
                wanted_id=as_uuid(client_id),
                title=title,
                system_prompt=system_prompt,
                metadata=metadata or "{}",
                created_at=datetime.now(UTC),
                limits=in_force.json,
            )
        return _found(row), is_new

    async def read(self, user_id: str, conversation_id: UUID) -> Conversation:
        """Return one conversation. Raises NotFound."""
        with unavailable_as_client_error():
            row = await read_conversation(self._database, user_id, conversation_id)
        return _found(row)

    async def list(
        self,
        user_id: str,
        *,
        limit: int,
        skip: int = 0,
        before: Place | None = None,
        search: str | None = None,
    ) -> ListedConversations:
        """Return at most `limit` conversations, newest activity first: after the first `skip`, after a place
        (updated_at, id), or those whose titles contain `search`, of the newest 5,000 of these."""
        with unavailable_as_client_error():
            page = await list_conversations(
                self._database, user_id, limit=limit, skip=skip, before=before, search=search
            )
        conversations = [_conversation(row) for row in page.rows]
        return ListedConversations(conversations, page.next_place, page.is_searched_to_its_end)

    async def update(
        self,
        user_id: str,
        conversation_id: UUID,
        changes: Mapping[str, str | None],
        *,
        limits: UserLimits | None = None,
    ) -> Conversation:
        """Set what `changes` has of title, system_prompt and metadata (JSON). `limits`: see `create`. Raises NotFound
        or RateLimited."""
        in_force = limits_in_force(limits, self._settings)
        with unavailable_as_client_error(), over_quota_as_client_error(in_force):
            row = await update_conversation(self._database, user_id, conversation_id, changes, limits=in_force.json)
        return _found(row)

    async def messages(
        self,
        user_id: str,
        conversation_id: UUID,
        *,
        limit: int,
        before: UUID | None,
        with_superseded: bool = True,
    ) -> Page:
        """Return the newest messages, or the newest before one of them: at most `limit` and 2 MiB. Raises NotFound."""
        with unavailable_as_client_error():
            page = await read_messages(
                self._database, user_id, conversation_id, limit=limit, before=before, with_superseded=with_superseded
            )
            if page is None:
                if before is not None and await read_conversation(self._database, user_id, conversation_id):
                    raise NotFound("There is no such message in this conversation.")
                raise NotFound
        return page

    async def append(
        self,
        user_id: str,
        conversation_id: UUID,
        given: Sequence[AnyPostedMessage],
        *,
        limits: UserLimits | None,
    ) -> tuple[Sequence[Message], int]:
        """Append messages, all or none; returns them and the seq of the last one's event. `limits`: see `create`.
        Raises ClientError."""
        created_at = datetime.now(UTC)
        in_force = limits_in_force(limits, self._settings)
        with unavailable_as_client_error(conversation_id), over_quota_as_client_error(in_force, conversation_id):
            appended = await append_messages(
                self._database,
                user_id,
                conversation_id,
                created_at=created_at,
                limits=in_force.json,
                checked=lambda tail: appended_of(
                    given,
                    tail,
                    created_at,
                    message_bytes_max=self._settings.message_bytes_max,
                    answer_bytes_max=self._settings.answer_bytes_max,
                ),
            )
        match appended.outcome:
            case "not_found":
                raise NotFound(conversation_id=conversation_id)
            case "conversation_busy":
                raise ConversationBusy(conversation_id=conversation_id)
        return [message for _, message in appended.messages], appended.last_seq

    async def find(self, user_id: str, client_id: str, conversation_id: UUID | None) -> UUID | None:
        """Return our id of the conversation with this id, ours or else the client's own; None where there is none."""
        with unavailable_as_client_error():
            return await find_conversation(self._database, user_id, client_id, conversation_id)

    async def find_chat(self, user_id: str, client_chat_id: str) -> Chat | None:
        """Return the conversation with this id, the client's own or ours, None where there is none."""
        with unavailable_as_client_error():
            return await find_chat(self._database, user_id, client_chat_id)

    async def find_chat_end(self, user_id: str, client_chat_id: str) -> ChatEnd | None:
        """Return what a chat ends with at this moment, None where there is no such chat."""
        with unavailable_as_client_error():
            return await find_chat_end(self._database, user_id, client_chat_id)

    async def find_sent(self, user_id: str, client_message_id: str) -> Sent | None:
        """Return what the user has sent under an id of a message, None where that is nothing."""
        with unavailable_as_client_error():
            return await find_sent(self._database, user_id, client_message_id)

    async def find_turn(self, user_id: str, turn_id: UUID) -> TurnRef | None:
        """Return a turn by its id alone, None where there is none."""
        with unavailable_as_client_error():
            return await find_turn(self._database, user_id, turn_id)

    async def usage(self, turn_ids: Collection[UUID]) -> Mapping[UUID, str]:
        """Return what turns that have ended cost, by their ids, as JSON."""
        with unavailable_as_client_error():
            return await read_usage(self._database, turn_ids)


def _found(row: asyncpg.Record | None) -> Conversation:
    if row is None:
        raise NotFound
    return _conversation(row)


def _conversation(row: asyncpg.Record) -> Conversation:
    return Conversation(
        row["id"],
        row["client_id"],
        row["title"],
        row["system_prompt"],
        Raw(row["metadata"].encode()),
        row["last_seq"],
        row["created_at"],
        row["updated_at"],
    )
