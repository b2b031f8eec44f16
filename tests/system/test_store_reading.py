"""`Store.reading`: the models read this database and never write, beside an application's own Tortoise."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import parse_qsl, unquote, urlsplit
from uuid import UUID

import asyncpg
import pytest
from tortoise import Tortoise
from tortoise.context import TortoiseContext
from tortoise.functions import Count, Max, Sum
from tortoise.models import Model
from tortoise.router import router
from tortoise.transactions import in_transaction

from anynode import Store
from anynode.models.tables import Conversation, Event, Message, Turn, User
from tests.kit.databases import fresh_database
from tests.kit.harness import sql
from tests.kit.notes import Note

EVERYTHING: Final = """
SELECT (SELECT jsonb_agg(c ORDER BY id) FROM conversations c) AS conversations,
       (SELECT jsonb_agg(m ORDER BY id) FROM messages m) AS messages,
       (SELECT jsonb_agg(u ORDER BY id) FROM users u) AS users
"""


@pytest.fixture
async def store(module_database_url: str) -> AsyncIterator[Store]:
    async with Store(module_database_url) as store:
        yield store


@pytest.fixture(scope="module")
def notes_url(postgres_url: str) -> Iterator[str]:
    """The database of the application's own table."""
    with fresh_database(postgres_url) as url:
        yield url


async def answering(messages: list[dict[str, Any]]) -> tuple[str, list[Any]]:
    """An agent that searches, and then says what the question was."""
    return f"You said: {messages[-1]['content']}", [{"name": "search", "id": "call-1"}]


async def talk(store: Store, user: str, *questions: str) -> Conversation:
    """A conversation with these questions, and an answer to each."""
    made = await store.create_conversation(user)
    for question in questions:
        await store.chat(user, question, made.id, answering)
    return made


# What is read.


async def test_models_read_rows_with_their_relations_in_both_directions(store: Store, user: str) -> None:
    made = await talk(store, user, "one", "two")
    await talk(store, user, "three")
    with store.reading():
        found = await Conversation.filter(user_id=user).order_by("created_at").prefetch_related("messages", "turns")
        assert [[message.role for message in each.messages] for each in found] == [
            ["user", "assistant", "tool", "assistant"] * 2,
            ["user", "assistant", "tool", "assistant"],
        ]
        assert [[turn.status for turn in each.turns] for each in found] == [["completed"] * 2, ["completed"]]
        last = (
            await Message.filter(conversation=made).order_by("-position").select_related("conversation", "turn").first()
        )
        assert last is not None
        assert last.turn is not None
        assert (last.content, last.conversation.id, last.turn.status) == ("You said: two", made.id, "completed")
        assert [message.content for message in await last.turn.messages.filter(role="user")] == ["two"]
        owner = await User.get(id=user).prefetch_related("conversations__messages")
        assert sum(len(each.messages) for each in owner.conversations) == 12
        events = await Event.filter(conversation=made).values_list("seq", "type")
        assert [seq for seq, _ in events] == list(range(1, len(events) + 1))
        assert await Message.filter(user_id=user, tool_calls__isnull=False).count() == 3


async def test_models_count_group_and_look_into_json(store: Store, user: str) -> None:
    made = await talk(store, user, "one", "two")
    await store.update_conversation(made.id, user, metadata={"kind": "test", "of": user})
    await talk(store, user, "three")
    with store.reading():
        counts = await (
            Conversation.filter(user_id=user)
            .annotate(messages_count=Count("messages"), last=Max("messages__position"))
            .order_by("created_at")
            .values_list("messages_count", "last")
        )
        assert counts == [(8, 8), (4, 4)]
        by_role = (
            await Message.filter(user_id=user)
            .annotate(count=Count("id"), sum=Sum("position"))
            .group_by("role")
            .values("role", "count")
        )
        assert {each["role"]: each["count"] for each in by_role} == {"user": 3, "assistant": 6, "tool": 3}
        assert await Conversation.filter(user_id=user, metadata__contains={"of": user}).exists()
        assert (await Conversation.raw(f"SELECT * FROM conversations WHERE id = '{made.id}'"))[0].title == "one"
        contents = [message.content async for message in Message.filter(conversation=made, role="user")]
        assert contents == ["one", "two"]
        assert (await Turn.filter(conversation=made).first()).usage["seconds"] >= 0  # type: ignore[union-attr]
        assert set(await Conversation.in_bulk([made.id], "id")) == {made.id}


async def test_many_queries_at_once_of_many_tasks_share_the_stores_connections(store: Store, user: str) -> None:
    made = await talk(store, user, "one")

    async def count() -> int:
        with store.reading():
            return await Message.filter(conversation=made).count()

    with store.reading():
        inside = await asyncio.gather(*(Message.filter(conversation=made).count() for _ in range(30)))
    assert set(inside) == set(await asyncio.gather(*(count() for _ in range(30)))) == {4}


async def test_two_stores_may_read_at_once_each_in_its_own_database(store: Store, user: str, notes_url: str) -> None:
    async with Store(notes_url) as other:
        for each, title in ((store, "here"), (other, "there")):
            await each.create_conversation(user, title)

        async def title_in(each: Store) -> str | None:
            with each.reading():
                await asyncio.sleep(0)
                return (await Conversation.get(user_id=user)).title

        assert await asyncio.gather(*map(title_in, [store, other] * 5)) == ["here", "there"] * 5
        with store.reading():
            with other.reading():
                assert (await Conversation.get(user_id=user)).title == "there"
            assert (await Conversation.get(user_id=user)).title == "here"


async def test_outside_of_reading_the_models_have_no_connection(store: Store, user: str) -> None:
    with store.reading():
        pass
    with pytest.raises(RuntimeError, match="No TortoiseContext is currently active"):
        await Conversation.filter(user_id=user)


# What is refused.

Write = Callable[[Conversation, Message], Awaitable[Any]]
NOW: Final = datetime(2026, 1, 1, tzinfo=UTC)


async def transaction(_: Conversation, __: Message) -> None:
    async with in_transaction():
        raise AssertionError("a transaction has begun")


async def set_title(made: Conversation, _: Message) -> None:
    made.title = "changed"
    await made.save()


WRITES: Final[dict[str, Write]] = {
    "save": set_title,
    "save a field": lambda made, _: made.save(update_fields=["title"]),
    "delete": lambda made, _: made.delete(),
    "delete a message": lambda _, message: message.delete(),
    "create": lambda *_: User.create(id="new"),
    "create a conversation": lambda made, _: Conversation.create(id=UUID(int=1), user_id=made.user_id),
    "update": lambda made, _: Conversation.filter(id=made.id).update(title="changed"),
    "update from dict": lambda made, _: made.update_from_dict({"title": "changed"}).save(),
    "delete all": lambda *_: Message.all().delete(),
    "bulk create": lambda *_: User.bulk_create([User(id="new"), User(id="newer")]),
    "bulk create ignoring": lambda *_: User.bulk_create([User(id="new")], ignore_conflicts=True),
    "bulk update": lambda made, _: Conversation.bulk_update([made], ["title"]),
    "get or create": lambda *_: User.get_or_create(id="new"),
    "update or create": lambda *_: User.update_or_create({"created_at": NOW}, id="new"),
    "raw update": lambda *_: Conversation.raw("UPDATE conversations SET title = 'changed' RETURNING *"),
    "raw delete": lambda *_: Message.raw(" \n DELETE FROM messages RETURNING *"),
    "raw insert": lambda *_: User.raw("insert into users (id) values ('new') returning *"),
    "raw with": lambda *_: User.raw(
        "WITH new AS (INSERT INTO users (id) VALUES ('new') RETURNING *) SELECT * FROM new"
    ),
    "raw script": lambda *_: Conversation._meta.db.execute_script("DELETE FROM messages"),
    "many": lambda *_: Conversation._meta.db.execute_many("INSERT INTO users (id) VALUES ($1)", [["new"]]),
    "transaction": transaction,
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
async def test_what_would_write_raises_and_writes_nothing(
    store: Store, user: str, module_database_url: str, write: Write
) -> None:
    made = await store.create_conversation(user, "Tea")
    message = await store.add_message(made.id, user, "user", "hello")
    before = await sql(module_database_url, EVERYTHING)
    with store.reading(), pytest.raises(TypeError, match=r"^The models only read; use the methods of Store "):
        await write(made, message)
    assert await sql(module_database_url, EVERYTHING) == before


async def test_a_raw_query_of_several_statements_is_refused_by_postgres(
    store: Store, user: str, module_database_url: str
) -> None:
    await store.create_conversation(user, "Tea")
    before = await sql(module_database_url, EVERYTHING)
    with store.reading(), pytest.raises(asyncpg.PostgresSyntaxError):
        await User.raw("SELECT * FROM users; DELETE FROM messages")
    assert await sql(module_database_url, EVERYTHING) == before


# An application's own Tortoise.


def configuration(url: str, *modules: str) -> dict[str, Any]:
    """What Tortoise is told of an application's database."""
    parts = urlsplit(url)
    parameters = dict(parse_qsl(parts.query))
    credentials = {
        "host": parameters.get("host") or parts.hostname,
        "port": parts.port or 5432,
        "user": unquote(parts.username or ""),
        "password": unquote(parts.password or ""),
        "database": parts.path.strip("/"),
    }
    return {
        "connections": {"default": {"engine": "tortoise.backends.asyncpg", "credentials": credentials}},
        "apps": {"models": {"models": [*modules], "default_connection": "default"}},
    }


@pytest.fixture
async def notes(notes_url: str) -> None:
    """An application's own Tortoise, with an empty table."""
    async with TortoiseContext() as context:
        await context.init(configuration(notes_url, "tests.kit.notes"))
        await context.generate_schemas()
        await Note.all().delete()


async def test_an_applications_own_tortoise_works_beside_a_store(
    store: Store, user: str, notes_url: str, notes: None
) -> None:
    await Tortoise.init(configuration(notes_url, "tests.kit.notes"))
    try:
        made = await talk(store, user, "one")
        note = await Note.create(text="mine")
        assert len(await store.get_conversation_history(made.id, user)) == 4
        note.text = "still mine"
        await note.save()
        async with in_transaction():
            await Note.create(text="in a transaction")
            assert len([message async for message in store.get_messages(made.id, user)]) == 4
        with store.reading():
            assert await Conversation.filter(user_id=user).count() == 1
        async with Store(notes_url) as late:
            assert await late.list_conversations(user) == []
        assert [note.text for note in await Note.all().order_by("id")] == ["still mine", "in a transaction"]
    finally:
        await Tortoise.close_connections()


class AllToDefault:
    """A router that sends every model to the application's own database."""

    def db_for_read(self, model: type[Model]) -> str:
        return "default"


async def test_an_applications_routers_do_not_lead_the_store_to_another_database(
    store: Store, user: str, notes_url: str, notes: None
) -> None:
    made = await talk(store, user, "one")
    await Tortoise.init({**configuration(notes_url, "tests.kit.notes"), "routers": [AllToDefault]})
    try:
        assert [each.id for each in await store.list_conversations(user)] == [made.id]
        assert len([message async for message in store.get_messages(made.id, user)]) == 4
        assert len(await store.get_conversation_history(made.id, user)) == 4
        assert len(await store.get_conversation_context(made.id, user)) == 4
        assert await Note.all().count() == 0
    finally:
        await Tortoise.close_connections()
        router.init_routers([])


async def test_an_applications_own_tortoise_works_inside_of_reading(
    store: Store, user: str, notes_url: str, notes: None
) -> None:
    made = await store.create_conversation(user, "Tea")
    await Tortoise.init(configuration(notes_url, "tests.kit.notes"))
    try:
        with store.reading():
            title = (await Conversation.get(id=made.id)).title
            await Note.create(text=f"about {title}")
            async with in_transaction("default"):
                await Note.create(text="in a transaction")
            assert await Note.all().count() == 2
            assert await Conversation.filter(user_id=user).count() == 1
        assert [note.text for note in await Note.all().order_by("id")] == ["about Tea", "in a transaction"]
    finally:
        await Tortoise.close_connections()


async def test_an_application_may_have_the_models_in_its_own_tortoise_too(
    store: Store, user: str, notes_url: str, notes: None
) -> None:
    await store.create_conversation(user, "here")
    await Tortoise.init(configuration(notes_url, "tests.kit.notes", "anynode.models.tables"))
    try:
        await User.create(id=user)
        await Conversation.create(id=(await store.create_conversation(user)).id, user_id=user, title="there")
        assert [each.title for each in await Conversation.filter(user_id=user)] == ["there"]
        assert [each.title for each in await store.list_conversations(user)] == [None, "here"]
        with store.reading():
            assert await Conversation.filter(user_id=user).count() == 2
        assert await Conversation.filter(user_id=user).count() == 1
    finally:
        await Tortoise.close_connections()
