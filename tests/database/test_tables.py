"""The Tortoise models: they describe the database as it is, and their relations can be queried."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest
from tortoise import Tortoise
from tortoise.fields.db_defaults import SqlDefault
from tortoise.fields.relational import RelationalField
from tortoise.indexes import Index
from tortoise.migrations.constraints import UniqueConstraint
from tortoise.models import Model

from anynode.models import tables
from anynode.models.migrate import tortoise_config
from anynode.models.tables import Conversation, Event, Message, Turn, User

MODELS: list[type[Model]] = [
    value
    for value in vars(tables).values()
    if isinstance(value, type) and issubclass(value, Model) and value is not Model
]
# The type that Postgres gives a column, for each kind of field.
TYPES = {
    "UUIDField": "uuid",
    "CharField": "text",
    "TextField": "text",
    "IntField": "integer",
    "BigIntField": "bigint",
    "FloatField": "double precision",
    "JSONField": "jsonb",
    "DatetimeField": "timestamp with time zone",
    "DateField": "date",
    "ArrayField": "uuid[]",
}
COLUMNS = """
    SELECT attname, format_type(atttypid, atttypmod) AS type, attnotnull, pg_get_expr(adbin, adrelid) AS default
    FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
    WHERE attrelid = $1::text::regclass AND attnum > 0
"""
KEYS = """
    SELECT contype, confrelid::regclass::text AS target, confdeltype,
           ARRAY(SELECT attname FROM unnest(conkey) WITH ORDINALITY AS k (attnum, n)
                 JOIN pg_attribute USING (attnum) WHERE attrelid = conrelid ORDER BY n)::text[] AS columns
    FROM pg_constraint WHERE conrelid = $1::text::regclass AND contype = ANY ($2::text[]::"char"[])
"""
INDEXES = """
    SELECT indexrelid::regclass::text AS name, pg_get_indexdef(indexrelid) AS definition FROM pg_index
    WHERE indrelid = $1::text::regclass AND NOT indisprimary
"""
ON_DELETE = {b"c": "CASCADE", b"a": "NO ACTION"}


@pytest.fixture
async def connection(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


@pytest.fixture(autouse=True)
async def initialised(database_url: str) -> AsyncIterator[None]:
    """Tortoise with its relations, on the test's database."""
    await Tortoise.init(config=tortoise_config(database_url))
    yield
    await Tortoise.close_connections()


def column_of(model: type[Model], field: str) -> str:
    """The column that a field, or a relation by its own name, is in."""
    described = model._meta.fields_map[field]
    if isinstance(described, RelationalField):
        return column_of(model, str(described.source_field))
    return described.source_field or field


async def test_the_database_has_exactly_the_tables_described(connection: asyncpg.Connection) -> None:
    rows = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    described = {str(model._meta.db_table) for model in MODELS}
    assert {row["tablename"] for row in rows} == described | {"tortoise_migrations"}


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
async def test_a_table_has_exactly_the_columns_described(connection: asyncpg.Connection, model: type[Model]) -> None:
    described = {}
    for name in model._meta.db_fields:
        field = model._meta.fields_map[name]
        type = TYPES[next(kind.__name__ for kind in field.__class__.__mro__ if kind.__name__ in TYPES)]
        default = field.db_default.get_sql() if isinstance(field.db_default, SqlDefault) else None
        rendered = None if default is None else await render_default(connection, type, default)
        described[column_of(model, name)] = (type, not field.null, rendered)
    rows = await connection.fetch(COLUMNS, model._meta.db_table)
    assert described == {row["attname"]: (row["type"], row["attnotnull"], row["default"]) for row in rows}


async def render_default(connection: asyncpg.Connection, type: str, default: str) -> str:
    """A default as Postgres shows it."""
    await connection.execute(f"CREATE TEMP TABLE probe (c {type} DEFAULT {default})")
    (row,) = await connection.fetch(COLUMNS, "probe")
    await connection.execute("DROP TABLE probe")
    return str(row["default"])


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
async def test_a_table_has_exactly_the_primary_key_described(
    connection: asyncpg.Connection, model: type[Model]
) -> None:
    (key,) = await connection.fetch(KEYS, model._meta.db_table, ["p"])
    described = [column_of(model, model._meta.pk_attr)]
    assert key["columns"] == (["conversation_id", *described] if model is Event else described)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
async def test_a_table_has_exactly_the_foreign_keys_described(
    connection: asyncpg.Connection, model: type[Model]
) -> None:
    described = set()
    for name in sorted(model._meta.fk_fields | model._meta.o2o_fields):
        relation: Any = model._meta.fields_map[name]
        other = relation.related_model._meta
        assert relation.related_name in other.backward_fk_fields | other.backward_o2o_fields
        if relation.db_constraint:
            described.add((column_of(model, name), relation.related_model._meta.db_table, str(relation.on_delete)))
    rows = await connection.fetch(KEYS, model._meta.db_table, ["f"])
    assert described == {(*row["columns"], row["target"], ON_DELETE[row["confdeltype"]]) for row in rows}


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
async def test_a_table_has_exactly_the_indexes_described(connection: asyncpg.Connection, model: type[Model]) -> None:
    described: dict[str, str] = {}
    for made in (*model._meta.indexes, *model._meta.constraints):
        assert isinstance(made, Index | UniqueConstraint)
        columns = [column_of(model, field) for field in made.fields]
        unique = "UNIQUE" if isinstance(made, UniqueConstraint) else ""
        condition = made.condition if isinstance(made, UniqueConstraint | tables.PartialIndex) else None
        described[str(made.name)] = await render_index(connection, model, columns, unique, condition)
    rows = {row["name"]: row["definition"] for row in await connection.fetch(INDEXES, model._meta.db_table)}
    assert set(described) == set(rows)
    for name, definition in rows.items():
        assert described[name] == definition.replace(f"INDEX {name} ON", "INDEX probe ON").replace(" DESC", "")


async def render_index(
    connection: asyncpg.Connection, model: type[Model], columns: list[str], unique: str, condition: str | None
) -> str:
    """An index as Postgres shows it, under the name `probe`."""
    where = "" if condition is None else f"WHERE {condition}"
    await connection.execute(f"CREATE {unique} INDEX probe ON {model._meta.db_table} ({', '.join(columns)}) {where}")
    definition = await connection.fetchval("SELECT pg_get_indexdef('probe'::regclass)")
    await connection.execute("DROP INDEX probe")
    return str(definition)


QUESTION, ANSWER, TURN, CHAT = (uuid.UUID(int=number) for number in range(1, 5))


@pytest.fixture
async def stored(connection: asyncpg.Connection) -> None:
    """A conversation of Ada's with a question, its answer, its turn and an event; and an empty one."""
    now = datetime.now(UTC)
    await connection.execute("INSERT INTO users (id) VALUES ('ada')")
    await connection.execute("INSERT INTO conversations (id, user_id, title) VALUES ($1, 'ada', 'first')", CHAT)
    await connection.execute("INSERT INTO conversations (id, user_id) VALUES ($1, 'ada')", uuid.UUID(int=9))
    await connection.execute(
        "INSERT INTO turns (id, conversation_id, status, node, epoch, lease_expires_at, usage)"
        " VALUES ($1, $2, 'running', 'n', 1, $3, '{\"input_tokens\": 7}')",
        *(TURN, CHAT, now),
    )
    for id, position, role in ((ANSWER, 2, "assistant"), (QUESTION, 1, "user")):
        await connection.execute(
            "INSERT INTO messages (id, conversation_id, user_id, position, role, content, turn_id)"
            " VALUES ($1, $2, 'ada', $3, $4, $5, $6)",
            *(id, CHAT, position, role, f"of the {role}", TURN),
        )
    await connection.execute("INSERT INTO events VALUES ($1, 1, $2, 1, 'turn.started', '{}')", CHAT, TURN)


@pytest.mark.usefixtures("stored")
async def test_a_conversation_is_read_with_its_messages_turns_and_events() -> None:
    conversation = await Conversation.get(id=CHAT).prefetch_related("messages__turn", "turns__messages", "events")
    assert [(message.id, message.content) for message in conversation.messages] == [
        (QUESTION, "of the user"),
        (ANSWER, "of the assistant"),
    ]
    assert [message.turn.id for message in conversation.messages if message.turn is not None] == [TURN, TURN]
    (turn,) = conversation.turns
    assert (turn.status, turn.attempts, turn.usage) == ("running", 1, {"input_tokens": 7})
    assert [message.id for message in turn.messages] == [QUESTION, ANSWER]
    assert [(event.seq, event.type) for event in conversation.events] == [(1, "turn.started")]


@pytest.mark.usefixtures("stored")
async def test_a_message_is_read_with_its_conversation_and_its_turn_in_one_query() -> None:
    message = await Message.get(id=ANSWER).select_related("conversation__user", "turn")
    assert (message.conversation.title, message.conversation.user.id) == ("first", "ada")
    assert message.turn is not None
    assert message.turn.node == "n"


@pytest.mark.usefixtures("stored")
async def test_conversations_are_filtered_by_what_belongs_to_them() -> None:
    (running,) = await Conversation.filter(turns__status="running", user__id="ada")
    assert running.title == "first"
    assert await User.filter(conversations__messages__role="assistant").count() == 1
    (asked,) = await Turn.filter(messages__content="of the user")
    assert asked.id == TURN


@pytest.mark.usefixtures("stored")
async def test_a_row_that_tortoise_inserts_gets_the_defaults_of_the_database() -> None:
    made = await Conversation.create(id=uuid.UUID(int=8), user_id="ada", title="made here")
    made = await Conversation.get(id=made.id)
    assert (made.metadata, made.last_seq) == ({}, 0)
    assert abs(made.created_at - datetime.now(UTC)).total_seconds() < 60


@pytest.mark.usefixtures("stored")
async def test_an_event_is_neither_saved_nor_deleted_by_half_of_its_key() -> None:
    event = await Event.get(conversation_id=CHAT, seq=1)
    with pytest.raises(TypeError, match="never changed"):
        await event.save()
    with pytest.raises(TypeError, match="two columns"):
        await event.delete()
    assert await Event.filter(conversation_id=CHAT, seq=1).delete() == 1
