"""The tables as Tortoise models: for migrations, scripts and tests. The serving path uses `queries.sql`.

The schema itself is in `migrations/`; tests/contract holds the two together.
"""

from __future__ import annotations

from typing import Any

from tortoise import fields
from tortoise.models import Model


class User(Model):
    """Whoever a token's `sub` names."""

    id = fields.CharField(255, primary_key=True)
    created_at = fields.DatetimeField()

    class Meta:
        table = "users"


class Conversation(Model):
    """A conversation; `last_seq` is the seq of its last event, or of `turn.started` while a turn runs; `changed_xid`
    the transaction that last began a turn."""

    id = fields.UUIDField(primary_key=True)
    user_id = fields.TextField()
    client_id = fields.TextField(null=True)
    title = fields.TextField(null=True)
    system_prompt = fields.TextField(null=True)
    metadata: fields.JSONField[Any] = fields.JSONField()
    last_seq = fields.BigIntField()
    changed_xid = fields.BigIntField()
    created_at = fields.DatetimeField()
    updated_at = fields.DatetimeField()

    class Meta:
        table = "conversations"


class Message(Model):
    """A message; `client_id` is the `message_id` that the client gave, `position` counts from 1."""

    id = fields.UUIDField(primary_key=True)
    conversation_id = fields.UUIDField()
    user_id = fields.TextField()
    client_id = fields.TextField(null=True)
    position = fields.IntField()
    role = fields.TextField()
    content = fields.TextField()
    tool_calls: fields.JSONField[Any] = fields.JSONField(null=True)
    tool_name = fields.TextField(null=True)
    tool_call_id = fields.TextField(null=True)
    turn_id = fields.UUIDField(null=True)
    status = fields.TextField()
    created_at = fields.DatetimeField()

    class Meta:
        table = "messages"


class Turn(Model):
    """A turn and its lease; `position` is its question's; `first_seq` is null once its events have been deleted;
    `attempts` counts the nodes that died of it, and is not `epoch`, which counts its owners."""

    id = fields.UUIDField(primary_key=True)
    conversation_id = fields.UUIDField()
    status = fields.TextField()
    node = fields.TextField()
    epoch = fields.IntField()
    attempts = fields.IntField()
    lease_expires_at = fields.DatetimeField()
    cancel_requested_at = fields.DatetimeField(null=True)
    position = fields.IntField(null=True)
    first_seq = fields.BigIntField(null=True)
    error: fields.JSONField[Any] = fields.JSONField(null=True)
    usage: fields.JSONField[Any] = fields.JSONField(null=True)
    created_at = fields.DatetimeField()
    finished_at = fields.DatetimeField(null=True)

    class Meta:
        table = "turns"


class Event(Model):
    """A row of the journal; `written_at` is null unless it belongs to no turn. Its primary key is (conversation_id,
    seq), which Tortoise cannot say."""

    conversation_id = fields.UUIDField(primary_key=True)
    seq = fields.BigIntField()
    turn_id = fields.UUIDField(null=True)
    epoch = fields.IntField()
    type = fields.TextField()
    payload: fields.JSONField[Any] = fields.JSONField()
    written_at = fields.DatetimeField(null=True)

    class Meta:
        table = "events"


class Deletion(Model):
    """That a conversation has been deleted, for as long as it takes every node to hear of it."""

    conversation_id = fields.UUIDField(primary_key=True)
    changed_xid = fields.BigIntField()
    deleted_at = fields.DatetimeField()

    class Meta:
        table = "deletions"


class Ticket(Model):
    """What a client connects with once, for the user of a token that expires at `token_expires_at` (Unix seconds);
    `hash` is the ticket's SHA-256, in hexadecimal."""

    hash = fields.CharField(64, primary_key=True)
    user_id = fields.TextField()
    token_expires_at = fields.FloatField()
    expires_at = fields.DatetimeField()

    class Meta:
        table = "tickets"
