"""The answers to the AI SDK's clients over HTTP, as types; `/openapi.json` is made of them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any
from uuid import UUID

from msgspec import UNSET, Meta, Struct, UnsetType

from anynode.server.protocol.bodies import Body


class ChatMessagesQuery(Body, frozen=True):
    """Which messages to return: the newest ones, or the newest before a mark."""

    limit: Annotated[int, Meta(ge=1, le=1000, description="Of stored ones: an answer with tools is several.")] = 200
    before: Annotated[UUID, Meta(description="A `next_before`.")] | None = None


class ShownMessage(Struct, frozen=True):
    """A message as the AI SDK shows it (its `UIMessage`).

    A question has the id that its client gave it. An answer has the id of its turn, and holds all of its steps.
    """

    id: str
    role: Annotated[str, Meta(extra_json_schema={"enum": ["system", "user", "assistant"]})]
    parts: Sequence[dict[str, Any]]
    metadata: dict[str, Any] | UnsetType = UNSET


class ChatMessages(Struct, frozen=True):
    """The messages that a chat begins with, oldest first; `next_before` is where older ones are, null where there are
    none."""

    messages: Sequence[ShownMessage]
    next_before: UUID | None


class Stopped(Struct, frozen=True):
    """The turn that was stopped, and is over; null where none ran."""

    conversation_id: UUID
    turn_id: UUID | None


class Ticket(Struct, frozen=True):
    """A ticket that admits one connection, as `?ticket=` in its URL, until `expires_at` (Unix seconds)."""

    ticket: str
    expires_at: float
