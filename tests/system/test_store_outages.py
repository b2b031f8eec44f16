"""A `Store` whose database is away, that is opened wrongly or closed, that many use, or that has a pooler before it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from anynode import (
    AgentEvent,
    AgentFailed,
    ConfigurationError,
    DatabaseUnavailable,
    InvalidFrame,
    Store,
    TextDelta,
    Turn,
)
from anynode.models.tables import Conversation
from tests.agents.scripted import eventually
from tests.kit.harness import free_port, sql, with_database
from tests.kit.pgbouncer import running_pgbouncer
from tests.kit.postgres_proxy import postgres_proxy
from tests.kit.soundness import assert_sound
from tests.kit.stored import ended


async def answering(messages: list[dict[str, Any]]) -> tuple[str, list[Any]]:
    """An agent that repeats the question."""
    return f"You said: {messages[-1]['content']}", []


async def hanging(turn: Turn) -> AsyncIterator[AgentEvent]:
    """An agent that says something, and then nothing more."""
    yield TextDelta("I begin ")
    await asyncio.Event().wait()


async def everything(store: Store, user: str) -> None:
    """Use every method."""
    made = await store.create_conversation(user, "Tea")
    assert (await store.get_or_create_conversation(made.id, user)).title == "Tea"
    chat = await store.get_or_create_conversation("chat", user)
    await store.add_message(made.id, user, "user", "hello")
    await store.save_conversation_messages(made.id, user, [{"role": "assistant", "content": "hi"}])
    assert (await store.chat(user, "how?", made.id, answering))["response"] == "You said: how?"
    assert [message.position async for message in store.get_messages(made.id, user)] == [1, 2, 3, 4]
    assert len(await store.get_conversation_history(made.id, user)) == 4
    assert len(await store.get_conversation_context(made.id, user)) == 4
    assert len((await store.load_conversation_history(user, made.id))[1]) == 4
    await store.update_conversation(made.id, user, metadata={"a": 1})
    with store.reading():
        assert (await Conversation.get(id=made.id).prefetch_related("messages")).metadata == {"a": 1}
    assert await store.delete_conversation(chat.id, user)
    assert [each.id for each in await store.list_conversations(user)] == [made.id]


async def test_every_method_says_that_postgres_is_away_and_the_same_store_works_again(
    module_database_url: str, user: str
) -> None:
    with postgres_proxy(module_database_url) as proxy:
        async with Store(proxy.url) as store:
            made = await store.create_conversation(user)
            await everything(store, f"{user} before")
            proxy.cut()

            async def all_messages() -> list[Any]:
                return [message async for message in store.get_messages(made.id, user)]

            async def reading() -> int:
                with store.reading():
                    return await Conversation.all().count()

            asked = [
                store.create_conversation(user),
                store.get_conversation(made.id, user),
                store.get_or_create_conversation(uuid.uuid4(), user),
                store.get_or_create_conversation(None, user),
                store.list_conversations(user),
                store.update_conversation(made.id, user, title="Tea"),
                store.delete_conversation(made.id, user),
                store.add_message(made.id, user, "user", "hello"),
                store.save_conversation_messages(made.id, user, [{"role": "user", "content": "hello"}]),
                all_messages(),
                store.get_conversation_history(made.id, user),
                store.get_conversation_context(made.id, user),
                store.load_conversation_history(user, made.id),
                store.chat(user, "hello", made.id, answering),
                store.chat(user, "hello", None, answering),
                reading(),
            ]
            async with asyncio.timeout(15):
                outcomes = await asyncio.gather(*asked, return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [DatabaseUnavailable] * len(asked)
            assert {str(outcome) for outcome in outcomes} == {
                "The database does not answer at the moment; nothing was lost, try again."
            }
            proxy.heal()
            await everything(store, f"{user} after")
            assert [message async for message in store.get_messages(made.id, user)] == []


async def test_a_short_outage_is_not_noticed(module_database_url: str, user: str) -> None:
    with postgres_proxy(module_database_url) as proxy:
        async with Store(proxy.url) as store:
            made = await store.create_conversation(user)
            for number in range(4):
                proxy.cut()
                asked = asyncio.create_task(store.chat(user, f"{number}", made.id, answering))
                await asyncio.sleep(0.1)
                proxy.heal()
                assert (await asked)["response"] == f"You said: {number}"
    await assert_sound(module_database_url, made.id)


# Opening.


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("mysql://ada:secret@127.0.0.1/chat", "it must begin with postgresql://"),
        ("", "it must begin with postgresql://"),
        ("postgresql://ada:secret@127.0.0.1", "it names no database"),
        ("postgresql://ada:sec[ret@127.0.0.1/chat", "it cannot be read as a URL"),
    ],
)
async def test_what_is_no_url_of_a_database_is_a_configuration_error_of_one_line(url: str, words: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        async with Store(url):
            pass
    assert str(refused.value).startswith("the Store's URL is not a Postgres URL: ")
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "sec" not in str(refused.value)


async def test_a_login_and_a_database_that_are_not_there_are_configuration_errors(postgres_url: str) -> None:
    stranger = postgres_url.replace("postgresql://", "postgresql://nobody_knows:secret@", 1)
    stranger = stranger if stranger.count("@") == 1 else "@".join((stranger.split("@")[0], stranger.split("@")[-1]))
    for url in (stranger, with_database(postgres_url, "not_there")):
        with pytest.raises(
            ConfigurationError, match=r"^Postgres cannot be used at the Store's URL: .*not exist \(SQLSTATE \w{5}\)$"
        ):
            async with Store(url):
                pass


async def test_a_database_that_is_not_migrated_is_a_configuration_error_that_says_what_to_do(
    postgres_url: str,
) -> None:
    name = f"test_{uuid.uuid4().hex}"
    await sql(postgres_url, f"CREATE DATABASE {name}")
    try:
        with pytest.raises(
            ConfigurationError, match=r"^the database's schema is behind \(.*\): run `anynode migrate`$"
        ):
            async with Store(with_database(postgres_url, name)):
                pass
    finally:
        await sql(postgres_url, f"DROP DATABASE {name} WITH (FORCE)")


async def test_a_postgres_that_is_not_there_is_unavailable_at_once() -> None:
    async with asyncio.timeout(3):
        with pytest.raises(DatabaseUnavailable):
            async with Store(f"postgresql://ada@127.0.0.1:{free_port()}/chat"):
                pass


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pool_max": 0}, "pool_max"),
        ({"lease_seconds": 0}, "lease_seconds"),
        ({"lease_seconds": float("nan")}, "lease_seconds"),
        ({"history_messages_max": 0}, "history_messages_max"),
    ],
)
def test_an_option_out_of_its_bounds_is_refused_by_its_name(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidFrame, match=f"^{words} must be "):
        Store("postgresql://ada@127.0.0.1/chat", **options)


# Closing.


async def test_closing_stops_the_turns_keeps_what_they_said_and_returns_it(module_database_url: str, user: str) -> None:
    async with Store(module_database_url) as store:
        asked = [asyncio.create_task(store.chat(user, "hello", f"chat {number}", hanging)) for number in range(5)]
        made = [await store.get_or_create_conversation(f"chat {number}", user) for number in range(5)]
        for each in made:
            await until_said(module_database_url, each.id)
    async with asyncio.timeout(5):
        answers = await asyncio.gather(*asked)
    assert [answer["response"] for answer in answers] == ["I begin "] * 5
    for each in made:
        messages = await assert_sound(module_database_url, each.id)
        assert [(message["content"], message["status"]) for message in messages] == [
            ("hello", "completed"),
            ("I begin ", "cancelled"),
        ]


@pytest.mark.parametrize("was_open", [False, True])
async def test_a_store_that_is_not_open_says_so_at_once(module_database_url: str, user: str, was_open: bool) -> None:
    store = Store(module_database_url)
    if was_open:
        async with store:
            pass
    with pytest.raises(RuntimeError, match="not open: use it inside `async with Store"):
        await store.list_conversations(user)
    with pytest.raises(RuntimeError, match="not open"), store.reading():
        pass


async def test_an_agent_that_is_silent_for_too_long_fails(module_database_url: str, user: str) -> None:
    async def run_agent(messages: object) -> tuple[str, None]:
        await asyncio.Event().wait()
        return "", None

    async with Store(module_database_url, agent_timeout_seconds=0.05) as store:
        with pytest.raises(AgentFailed, match=r"nothing for 0\.05 seconds"):
            await store.chat(user, "hello", agent=run_agent)
    with pytest.raises(InvalidFrame, match="agent_timeout_seconds must be more than 0"):
        Store(module_database_url, agent_timeout_seconds=0)


async def test_a_store_may_be_closed_again_and_opened_again(module_database_url: str, user: str) -> None:
    store = Store(module_database_url)
    for number in range(2):
        async with store:
            await everything(store, f"{user} {number}")
        await store.close()


async def test_cancelling_a_call_stops_its_turn(module_database_url: str, user: str) -> None:
    async with Store(module_database_url) as store:
        made = await store.create_conversation(user)
        asked = asyncio.create_task(store.chat(user, "hello", made.id, hanging))
        await until_said(module_database_url, made.id)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        await eventually(ended(module_database_url, str(made.id)))
        assert (await store.chat(user, "again", made.id, answering))["response"] == "You said: again"
        messages = await assert_sound(module_database_url, made.id)
        assert [message["status"] for message in messages] == ["completed", "cancelled", "completed", "completed"]


async def until_said(database_url: str, conversation_id: uuid.UUID) -> None:
    """Wait until the journal has a text of the conversation."""
    statement = "SELECT 1 FROM events WHERE conversation_id = $1 AND type = 'turn.delta'"
    async with asyncio.timeout(10):
        while not await sql(database_url, statement, conversation_id):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


# Many at once.


@pytest.fixture(scope="module")
def pooled_url(module_database_url: str, postgres_url: str) -> Iterator[str]:
    with running_pgbouncer(postgres_url, pool_size=3) as pgbouncer:
        yield pgbouncer.url(module_database_url)


@pytest.mark.parametrize("is_pooled", [False, True])
async def test_many_tasks_use_one_store_at_once(
    module_database_url: str, pooled_url: str, user: str, is_pooled: bool
) -> None:
    async with Store(pooled_url if is_pooled else module_database_url, pool_max=2) as store:
        await asyncio.gather(*(everything(store, f"{user} {number}") for number in range(20)))
        made = {(await store.get_or_create_conversation("one", user)).id}
        made |= {
            each.id
            for each in await asyncio.gather(*(store.get_or_create_conversation("one", user) for _ in range(20)))
        }
        assert len(made) == 1
        assert store._parts.database.is_pooled is is_pooled
