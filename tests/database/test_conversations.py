"""Conversations that are found by an id or made: once, however many ask at the same instant."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from anynode.models.conversations import create_conversation, get_or_create_conversation
from anynode.models.database import Database, Unavailable
from anynode.models.ids import as_uuid, uuid7
from tests.agents.scripted import eventually
from tests.kit.harness import sql
from tests.kit.postgres_proxy import postgres_proxy

OTHERS_ID = UUID("00000000-0000-4000-8000-00000000000a")
NOW = datetime(2026, 1, 15, 9, 30, 0, 125, UTC)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    database = await Database.connect(database_url, pool_max=8)
    yield database
    await database.close()


@pytest.fixture
async def connection(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


async def get_or_create(database: Database, text: str | None, user_id: str = "ada", **other: Any) -> Any:
    """What is found or made for a text that may be either id, under the client's id."""
    arguments = {
        "conversation_id": uuid7(),
        "client_id": text,
        "wanted_id": as_uuid(text or ""),
        "title": "new",
        "system_prompt": None,
        "metadata": '{"new": true}',
        "created_at": NOW,
        **other,
    }
    return await get_or_create_conversation(database, user_id, **arguments)


async def create(database: Database, user_id: str, id: UUID) -> None:
    await create_conversation(
        database, user_id, id, title="old", system_prompt="kind", metadata="{}", created_at=NOW - timedelta(days=1)
    )


async def wait_blocked(connection: asyncpg.Connection, database_url: str) -> None:
    """Wait until a statement waits for the transaction of this connection."""
    pid = connection.get_server_pid()

    async def is_blocked() -> object:
        return await sql(database_url, "SELECT FROM pg_stat_activity WHERE $1 = ANY (pg_blocking_pids(pid))", pid)

    await eventually(is_blocked)


async def conversations(database_url: str) -> list[tuple[Any, ...]]:
    rows = await sql(database_url, "SELECT user_id, id, client_id, title FROM conversations ORDER BY user_id, id")
    return [tuple(row) for row in rows]


async def test_a_conversation_is_made_under_a_new_id_with_the_clients_own(database: Database) -> None:
    id = uuid7()
    row, is_new = await get_or_create(database, "chat 1", conversation_id=id)
    assert is_new
    assert (
        dict(row).items()
        >= {
            "id": id,
            "client_id": "chat 1",
            "title": "new",
            "system_prompt": None,
            "metadata": '{"new": true}',
            "last_seq": 0,
            "created_at": NOW,
            "updated_at": NOW,
        }.items()
    )


async def test_without_any_id_to_look_for_a_conversation_is_made_every_time(database: Database) -> None:
    made = [await get_or_create(database, None) for _ in range(2)]
    assert [(row["client_id"], is_new) for row, is_new in made] == [(None, True)] * 2


async def test_what_is_there_is_found_and_stays_as_it_is(database: Database, database_url: str) -> None:
    (made, _), before = await get_or_create(database, "chat 1"), await conversations(database_url)
    other: dict[str, Any] = {
        "title": "other",
        "system_prompt": "other",
        "metadata": "{}",
        "created_at": NOW + timedelta(1),
    }
    for text in ("chat 1", str(made["id"]), str(made["id"]).upper()):
        row, is_new = await get_or_create(database, text, **other)
        assert not is_new
        assert {**row, "is_new": None} == {**made, "is_new": None}
    assert await conversations(database_url) == before


async def test_a_text_is_the_clients_id_before_it_is_ours(database: Database) -> None:
    ours = uuid7()
    theirs, _ = await get_or_create(database, str(ours))  # a client may choose an id that looks like ours
    await create(database, "ada", ours)
    for client_id in (str(ours), None):
        row, is_new = await get_or_create(database, client_id, wanted_id=ours)
        assert (row["id"], is_new) == (theirs["id"], False)


async def test_two_users_have_a_conversation_each_under_one_clients_id(database: Database) -> None:
    made = [await get_or_create(database, "chat 1", user) for user in ("ada", "grace", "ada", "grace")]
    assert [is_new for _, is_new in made] == [True, True, False, False]
    assert len({row["id"] for row, _ in made}) == 2


async def test_somebody_elses_id_finds_nothing_and_is_as_good_a_clients_id_as_any(database: Database) -> None:
    await create(database, "grace", OTHERS_ID)
    id = uuid7()
    row, is_new = await get_or_create(database, str(OTHERS_ID), conversation_id=id)
    assert (row["id"], row["client_id"], is_new) == (id, str(OTHERS_ID), True)


async def test_a_conversation_may_be_made_under_a_wanted_id_itself(database: Database) -> None:
    wanted = uuid7()
    made, is_new = await get_or_create(database, None, wanted_id=wanted)
    assert (made["id"], made["client_id"], is_new) == (wanted, None, True)
    found, is_new = await get_or_create(database, None, wanted_id=wanted)
    assert (found["id"], is_new) == (wanted, False)


async def test_a_wanted_id_that_another_user_has_is_taken_and_nothing_is_written(
    database: Database, database_url: str
) -> None:
    await create(database, "grace", OTHERS_ID)
    before = await conversations(database_url)
    assert await get_or_create(database, None, wanted_id=OTHERS_ID) == (None, False)
    assert await conversations(database_url) == before
    assert [row["id"] for row in await sql(database_url, "SELECT id FROM users")] == ["grace"]


@pytest.mark.parametrize("is_wanted", [False, True])
async def test_of_many_who_ask_at_once_one_makes_it_and_all_get_it(
    database: Database, database_url: str, is_wanted: bool
) -> None:
    for _ in range(10):
        text = str(uuid7())
        client_id = None if is_wanted else text
        others = await asyncio.gather(
            *(get_or_create(database, client_id, "new" + text, wanted_id=UUID(text)) for _ in range(16))
        )
        assert Counter(is_new for _, is_new in others) == {True: 1, False: 15}
        assert len({row["id"] for row, _ in others}) == 1
    assert len(await conversations(database_url)) == 10


async def test_what_another_transaction_makes_at_the_same_instant_is_found(
    database: Database, database_url: str, connection: asyncpg.Connection
) -> None:
    id = uuid7()
    await connection.execute("INSERT INTO users (id) VALUES ('ada')")
    async with connection.transaction():
        await connection.execute("INSERT INTO conversations (id, user_id, client_id) VALUES ($1, 'ada', 'chat')", id)
        asking = asyncio.create_task(get_or_create(database, "chat"))
        await wait_blocked(connection, database_url)
    row, is_new = await asking
    assert (row["id"], is_new) == (id, False)


async def test_a_wanted_id_that_another_user_gets_at_the_same_instant_is_taken(
    database: Database, database_url: str, connection: asyncpg.Connection
) -> None:
    await connection.execute("INSERT INTO users (id) VALUES ('grace')")
    async with connection.transaction():
        await connection.execute("INSERT INTO conversations (id, user_id) VALUES ($1, 'grace')", OTHERS_ID)
        asking = asyncio.create_task(get_or_create(database, None, wanted_id=OTHERS_ID))
        await wait_blocked(connection, database_url)
    assert await asking == (None, False)


async def test_a_new_users_conversation_waits_for_the_user_before_it_takes_its_ids(
    database: Database, database_url: str, connection: asyncpg.Connection
) -> None:
    """An admission of the same chat inserts the user first too; otherwise each would wait for the other."""
    id = uuid7()
    async with connection.transaction():
        await connection.execute("INSERT INTO users (id) VALUES ('ada')")
        asking = asyncio.create_task(get_or_create(database, "chat"))
        await wait_blocked(connection, database_url)
        await connection.execute("SET LOCAL lock_timeout = '300ms'")  # less than a deadlock takes to be found
        await connection.execute("INSERT INTO conversations (id, user_id, client_id) VALUES ($1, 'ada', 'chat')", id)
    row, is_new = await asking
    assert (row["id"], is_new) == (id, False)


@pytest.mark.parametrize("is_wanted", [False, True])
async def test_who_made_it_and_lost_the_answer_is_told_so_and_others_are_not(
    database_url: str, is_wanted: bool
) -> None:
    wanted = uuid7()
    with postgres_proxy(database_url) as proxy:
        database = await Database.connect(proxy.url, pool_max=2)
        try:
            for is_new in (True, False):
                hold = proxy.hold("after", "get_or_create_conversation")
                # Under a new id only its own conversation has that id; a wanted one's is told by its time.
                created_at = NOW + timedelta(microseconds=int(is_wanted and not is_new))
                client_id = None if is_wanted else str(wanted)
                asking = asyncio.create_task(
                    get_or_create(database, client_id, wanted_id=wanted, created_at=created_at)
                )
                await hold.reached()
                proxy.cut()
                proxy.heal()
                row, says_new = await asking
                assert says_new is is_new
                assert (row["id"] == wanted) is is_wanted
        finally:
            await database.close()


async def test_a_conversation_that_never_gets_made_is_given_up(database: Database, database_url: str) -> None:
    """The trigger stands for others that make and delete the conversation in the midst of each attempt."""
    await sql(database_url, "CREATE FUNCTION skip() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'")
    await sql(database_url, "CREATE TRIGGER skip BEFORE INSERT ON conversations FOR EACH ROW EXECUTE FUNCTION skip()")
    with pytest.raises(Unavailable):
        await get_or_create(database, "chat")
