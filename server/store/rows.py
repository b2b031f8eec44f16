"""The rows that a `Store`, `anynode export` and `anynode forget` read, through the models of `anynode.models.tables`.
Every query filters by the user.

Importing this loads Tortoise, which takes longer than all else that a node loads. So a store imports it when it first
reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Final
from uuid import UUID

from tortoise.expressions import Q, RawSQL
from tortoise.functions import Count
from tortoise.queryset import QuerySet

from anynode.models.database import Database
from anynode.models.orm import Orm
from anynode.models.rules import SUPERSEDED
from anynode.models.tables import Conversation, Message, Turn, User
from anynode.server.engine.postgres_errors import unavailable_as_client_error

PAGE_MESSAGES: Final = 500  # messages that are held at once, at most …
PAGE_BYTES: Final = 2_097_152  # … and their bytes, unless one message alone has more
PAGE_CONVERSATIONS: Final = 100  # each has a system prompt and metadata
PAGE_TURNS: Final = 500


class Rows:
    """The rows of one database. All methods raise DatabaseUnavailable."""

    def __init__(self, database: Database) -> None:
        self._orm = Orm(database)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Let the models read the database while the context lasts, in the current task."""
        with unavailable_as_client_error(), self._orm.reading():
            yield

    async def conversation(self, user_id: str, client_id: str, id: UUID | None) -> Conversation | None:
        """Return the user's conversation with the application's own id, or else with ours. None: there is none.

        `id` is the same text as a UUID, None if it is no UUID. It may be spelled in capitals.
        """
        ids = [client_id] if id is None else [client_id, str(id)]
        is_meant = Q(client_id__in=ids) if id is None else Q(client_id__in=ids) | Q(id=id)
        with self.reading():
            found = await self._conversations.filter(is_meant, user_id=user_id)
        return min(found, key=lambda each: (each.client_id != client_id, each.client_id not in ids), default=None)

    async def conversations(self, user_id: str, *, skip: int, limit: int) -> list[Conversation]:
        """Return a user's conversations, newest activity first."""
        with self.reading():
            newest = self._conversations.filter(user_id=user_id).order_by("-updated_at", "-id")
            return await newest.offset(skip).limit(limit)

    async def messages(self, user_id: str, ids: list[UUID]) -> list[Message]:
        """Return messages by their ids, in order."""
        with self.reading():
            return await self._messages.filter(id__in=ids, user_id=user_id).order_by("position")

    async def newest(self, user_id: str, conversation_id: UUID, limit: int) -> list[Message]:
        """Return the newest messages, oldest first, without superseded answers."""
        with self.reading():
            standing = self._messages.filter(conversation_id=conversation_id, user_id=user_id).exclude(
                status=SUPERSEDED
            )
            return (await standing.order_by("-position").limit(limit))[::-1]

    async def page(self, user_id: str, conversation_id: UUID, after: int) -> list[Message]:
        """Return the messages after a position, as many as may be held at once; none after the last one."""
        size = RawSQL("octet_length(content) + coalesce(octet_length(tool_calls::text), 0)")
        with self.reading():
            later = self._messages.filter(conversation_id=conversation_id, user_id=user_id, position__gt=after)
            later = later.order_by("position")
            sizes = await later.limit(PAGE_MESSAGES).annotate(size=size).values_list("position", "size")
            last, total = after, 0
            for position, bytes in sizes:
                total += bytes
                if last > after and total > PAGE_BYTES:
                    break
                last = position
            return await later.filter(position__lte=last) if last > after else []

    async def leading_system_message(self, user_id: str, conversation_id: UUID) -> Message | None:
        """Return the first message if it is a system's."""
        with self.reading():
            return await self._messages.filter(
                conversation_id=conversation_id, user_id=user_id, position=1, role="system"
            ).first()

    # All of a user.

    async def user(self, user_id: str) -> User | None:
        """Return a user, or None where nothing but tickets can be stored of them."""
        with self.reading():
            return await self._users.filter(id=user_id).first()

    async def conversation_count(self, user_id: str) -> int:
        """Return how many conversations a user has."""
        with self.reading():
            return await self._conversations.filter(user_id=user_id).count()

    async def oldest(self, user_id: str, after: tuple[datetime, UUID] | None = None) -> list[Conversation]:
        """Return a user's oldest conversations after one of them (its `created_at` and `id`), at most
        PAGE_CONVERSATIONS."""
        with self.reading():
            later = self._conversations.filter(user_id=user_id)
            if after is not None:
                created_at, id = after
                later = later.filter(Q(created_at__gt=created_at) | Q(created_at=created_at, id__gt=id))
            return await later.order_by("created_at", "id").limit(PAGE_CONVERSATIONS)

    async def turns(self, user_id: str, conversation_id: UUID, after: UUID | None = None) -> list[Turn]:
        """Return the turns of a conversation after one of them, oldest first, at most PAGE_TURNS."""
        with self.reading():
            later = self._turns.filter(conversation_id=conversation_id, conversation__user_id=user_id)
            if after is not None:
                later = later.filter(id__gt=after)
            return await later.order_by("id").limit(PAGE_TURNS)

    async def message_counts(self, user_id: str, conversation_ids: Sequence[UUID]) -> Mapping[UUID, int]:
        """Return how many messages conversations have; those without any are left out."""
        with self.reading():
            counted = self._messages.filter(conversation_id__in=list(conversation_ids), user_id=user_id)
            counted = counted.annotate(messages=Count("id")).order_by().group_by("conversation_id")
            return dict(await counted.values_list("conversation_id", "messages"))

    # The connection is named, as an application's routers may choose one for any model.

    @property
    def _conversations(self) -> QuerySet[Conversation]:
        return Conversation.all().using_db(self._orm.client)

    @property
    def _messages(self) -> QuerySet[Message]:
        return Message.all().using_db(self._orm.client)

    @property
    def _turns(self) -> QuerySet[Turn]:
        return Turn.all().using_db(self._orm.client)

    @property
    def _users(self) -> QuerySet[User]:
        return User.all().using_db(self._orm.client)
