"""The tables as Tortoise models, with their relations: for reading in Python code, for scripts and for tests.

The serving path uses `queries.sql`, and the schema itself is in `schema.sql`. tests/database/test_tables.py compares
the models with the database: columns, nullability, defaults, keys, relations and indexes.

Tortoise cannot say these things, which the database has:

- a primary key of two columns: `Event` names one of them, and refuses what Tortoise would do by that one alone;
- a primary key of type text: it is a `CharField` here;
- the direction of an index's column: `conversations_newest` is descending in its last two;
- CHECK constraints, and storage parameters.

A relation without a foreign key in the database has `db_constraint=False`. `Ticket.user_id` is no relation, because a
user is only stored with a first conversation or an e-mail address.
"""

from __future__ import annotations

from typing import Any, NoReturn

from tortoise import fields
from tortoise.contrib.postgres.fields import ArrayField
from tortoise.fields.base import OnDelete
from tortoise.fields.db_defaults import SqlDefault
from tortoise.indexes import Index
from tortoise.migrations.constraints import UniqueConstraint
from tortoise.models import Model

_NOW = SqlDefault("clock_timestamp()")
_THIS_TRANSACTION = SqlDefault("pg_current_xact_id()::text::bigint")


class PartialIndex(Index):
    """An index of the rows for which `condition`, which is SQL, is true; Tortoise's own takes only equations."""

    def __init__(self, *, fields: tuple[str, ...], name: str, condition: str) -> None:
        super().__init__(fields=fields, name=name)
        self.condition = condition
        self.extra = f" WHERE {condition}"


class User(Model):
    """A user, named by the `sub` of a token. `email` is that of the newest token which had one."""

    id = fields.CharField(255, primary_key=True)
    created_at = fields.DatetimeField(db_default=_NOW)
    email = fields.TextField(null=True)

    conversations: fields.ReverseRelation[Conversation]
    messages: fields.ReverseRelation[Message]

    class Meta:
        table = "users"


class UserUsage(Model):
    """What a user has spent and stored, as admissions count it.

    `running` are turns that ran when it was written. `minute_turns` have begun since `minute_started_at`, and
    `day_tokens` were spent on `day` (UTC). `conversations` and `bytes` are added up since they were measured.
    """

    user: fields.OneToOneRelation[User] = fields.OneToOneField(
        "models.User", related_name="usage", on_delete=OnDelete.CASCADE, primary_key=True
    )
    user_id: str
    running: Any = ArrayField(element_type="uuid", db_default=SqlDefault("'{}'::uuid[]"))
    minute_started_at = fields.DatetimeField(db_default=SqlDefault("'-infinity'::timestamp with time zone"))
    minute_turns = fields.IntField(db_default=SqlDefault("0"))
    day = fields.DateField(db_default=SqlDefault("'-infinity'::date"))
    day_tokens = fields.BigIntField(db_default=SqlDefault("0"))
    conversations = fields.BigIntField(db_default=SqlDefault("0"))
    bytes = fields.BigIntField(db_default=SqlDefault("0"))
    measured_at = fields.DatetimeField(db_default=SqlDefault("'-infinity'::timestamp with time zone"))

    class Meta:
        table = "user_usage"


class Conversation(Model):
    """A conversation. `client_id` is the id that an outside client has given it.

    `last_seq` is the seq of its last event or, while a turn runs, of the turn's `turn.started`. `changed_xid` is the
    transaction that last began a turn.
    """

    id = fields.UUIDField(primary_key=True)
    user: fields.ForeignKeyRelation[User] = fields.ForeignKeyField(
        "models.User", related_name="conversations", on_delete=OnDelete.NO_ACTION
    )
    user_id: str
    client_id = fields.TextField(null=True)
    title = fields.TextField(null=True)
    system_prompt = fields.TextField(null=True)
    metadata: fields.JSONField[Any] = fields.JSONField(db_default=SqlDefault("'{}'::jsonb"))
    last_seq = fields.BigIntField(db_default=SqlDefault("0"))
    changed_xid = fields.BigIntField(db_default=_THIS_TRANSACTION)
    created_at = fields.DatetimeField(db_default=_NOW)
    updated_at = fields.DatetimeField(db_default=_NOW)

    messages: fields.ReverseRelation[Message]
    turns: fields.ReverseRelation[Turn]
    events: fields.ReverseRelation[Event]

    class Meta:
        table = "conversations"
        indexes = (
            Index(fields=("user_id", "updated_at", "id"), name="conversations_newest"),
            Index(fields=("changed_xid",), name="conversations_changed"),
        )
        constraints = (UniqueConstraint(("user_id", "client_id"), "conversations_client_id", "client_id IS NOT NULL"),)


class Message(Model):
    """A message. `client_id` is the `message_id` that the client gave, `position` counts from 1.

    `user` is the conversation's. `turn` is the turn of an answer; of a question, that of its newest answer.
    """

    id = fields.UUIDField(primary_key=True)
    conversation: fields.ForeignKeyRelation[Conversation] = fields.ForeignKeyField(
        "models.Conversation", related_name="messages", on_delete=OnDelete.CASCADE
    )
    conversation_id: Any
    user: fields.ForeignKeyRelation[User] = fields.ForeignKeyField(
        "models.User", related_name="messages", on_delete=OnDelete.NO_ACTION, db_constraint=False
    )
    user_id: str
    client_id = fields.TextField(null=True)
    position = fields.IntField()
    role = fields.TextField()
    content = fields.TextField()
    tool_calls: fields.JSONField[Any] = fields.JSONField(null=True)
    tool_name = fields.TextField(null=True)
    tool_call_id = fields.TextField(null=True)
    turn: fields.ForeignKeyNullableRelation[Turn] = fields.ForeignKeyField(
        "models.Turn", related_name="messages", on_delete=OnDelete.NO_ACTION, null=True, db_constraint=False
    )
    turn_id: Any
    status = fields.TextField(db_default=SqlDefault("'completed'::text"))
    created_at = fields.DatetimeField(db_default=_NOW)

    class Meta:
        table = "messages"
        ordering = ("position",)
        constraints = (
            UniqueConstraint(("conversation_id", "position"), "messages_position"),
            UniqueConstraint(("user_id", "client_id"), "messages_client_id", "client_id IS NOT NULL"),
        )


class Turn(Model):
    """A turn and its lease. `position` is its question's; `first_seq` is null once its events have been deleted.

    `epoch` counts its owners; `attempts` counts how often it was begun, and being handed over begins nothing.
    """

    id = fields.UUIDField(primary_key=True)
    conversation: fields.ForeignKeyRelation[Conversation] = fields.ForeignKeyField(
        "models.Conversation", related_name="turns", on_delete=OnDelete.CASCADE
    )
    conversation_id: Any
    status = fields.TextField()
    node = fields.TextField()
    epoch = fields.IntField()
    attempts = fields.IntField(db_default=SqlDefault("1"))
    lease_expires_at = fields.DatetimeField()
    cancel_requested_at = fields.DatetimeField(null=True)
    position = fields.IntField(null=True)
    first_seq = fields.BigIntField(null=True)
    error: fields.JSONField[Any] = fields.JSONField(null=True)
    usage: fields.JSONField[Any] = fields.JSONField(null=True)
    created_at = fields.DatetimeField(db_default=_NOW)
    finished_at = fields.DatetimeField(null=True)

    messages: fields.ReverseRelation[Message]
    events: fields.ReverseRelation[Event]

    class Meta:
        table = "turns"
        indexes = (
            Index(fields=("conversation_id", "id"), name="turns_conversation"),
            PartialIndex(fields=("finished_at",), name="turns_in_journal", condition="first_seq IS NOT NULL"),
            PartialIndex(
                fields=("node",),
                name="turns_to_cancel",
                condition="status = 'running' AND cancel_requested_at IS NOT NULL",
            ),
        )
        constraints = (UniqueConstraint(("conversation_id",), "turns_running", "status = 'running'"),)


class Event(Model):
    """A row of the journal; `written_at` is null unless it belongs to no turn.

    Its primary key is (conversation_id, seq). Tortoise is told of `seq` alone, and would save or delete the events of
    all conversations that have it: so an event can only be read. In Python, events of two conversations may be equal.
    """

    conversation: fields.ForeignKeyRelation[Conversation] = fields.ForeignKeyField(
        "models.Conversation", related_name="events", on_delete=OnDelete.NO_ACTION, db_constraint=False
    )
    conversation_id: Any
    seq = fields.BigIntField(primary_key=True, generated=False)
    turn: fields.ForeignKeyNullableRelation[Turn] = fields.ForeignKeyField(
        "models.Turn", related_name="events", on_delete=OnDelete.NO_ACTION, null=True, db_constraint=False
    )
    turn_id: Any
    epoch = fields.IntField()
    type = fields.TextField()
    payload: fields.JSONField[Any] = fields.JSONField()
    written_at = fields.DatetimeField(null=True)

    class Meta:
        table = "events"
        ordering = ("seq",)
        indexes = (PartialIndex(fields=("written_at",), name="events_without_turn", condition="turn_id IS NULL"),)

    async def save(self, *_: Any, **__: Any) -> NoReturn:
        """Raise TypeError."""
        raise TypeError("An event is never changed; events are written by the statements of queries.sql.")

    async def delete(self, *_: Any, **__: Any) -> NoReturn:
        """Raise TypeError."""
        raise TypeError("An event has a key of two columns; delete it by a filter on conversation_id and seq.")


class Deletion(Model):
    """A conversation that was deleted a moment ago; kept until every node has heard of it."""

    conversation_id = fields.UUIDField(primary_key=True)
    changed_xid = fields.BigIntField(db_default=_THIS_TRANSACTION)
    deleted_at = fields.DatetimeField(db_default=_NOW)

    class Meta:
        table = "deletions"
        indexes = (Index(fields=("changed_xid",), name="deletions_changed"),)


class Ticket(Model):
    """A ticket that nobody has used yet. `hash` is its SHA-256, in hexadecimal.

    `token_expires_at` and `issued_at` (Unix seconds) are those of the token that it was exchanged for, `limits` what
    that token allows; the last two are null from a node of a release before migration 0010.
    """

    hash = fields.CharField(64, primary_key=True)
    user_id = fields.TextField()
    token_expires_at = fields.FloatField()
    expires_at = fields.DatetimeField()
    issued_at = fields.FloatField(null=True)
    limits: fields.JSONField[Any] = fields.JSONField(null=True)

    class Meta:
        table = "tickets"
        indexes = (
            Index(fields=("user_id", "expires_at"), name="tickets_user"),
            Index(fields=("expires_at",), name="tickets_expired"),
        )


class Revocation(Model):
    """The time (`not_before`, Unix seconds) since when the tokens of a user must have been issued.

    `user_hash` is SHA-256 of the user's id, in hexadecimal; `*` stands for all users.
    """

    user_hash = fields.CharField(64, primary_key=True)
    not_before = fields.FloatField()
    changed_xid = fields.BigIntField(db_default=_THIS_TRANSACTION)

    class Meta:
        table = "revocations"
        indexes = (
            Index(fields=("changed_xid",), name="revocations_changed"),
            Index(fields=("not_before",), name="revocations_expired"),
        )
