"""The statements about users: e-mail addresses, and a user's end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

import asyncpg
import pytest

from anynode.models.database import Database
from anynode.models.tickets import add_ticket
from anynode.models.users import delete_user
from anynode.models.users import write_emails as write
from tests.agents.scripted import eventually
from tests.kit.harness import sql

NOW = 1e9  # seconds, long ago


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    opened = await Database.connect(database_url, pool_max=4)
    yield opened
    await opened.close()


async def write_emails(
    database: Database, emails: Mapping[str, str], *, issued_at: float = NOW, within_seconds: float = 5.0
) -> None:
    await write(database, emails, issued_at=dict.fromkeys(emails, issued_at), within_seconds=within_seconds)


async def emails(database_url: str) -> dict[str, str | None]:
    return {row["id"]: row["email"] for row in await sql(database_url, "SELECT id, email FROM users")}


def waits_for_a_lock(database_url: str) -> Callable[[], Awaitable[object]]:
    """Whether a statement on the database waits for a lock."""
    statement = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    return lambda: sql(database_url, statement)


async def test_addresses_are_stored_for_users_who_are_new_and_for_those_who_are_not(
    database: Database, database_url: str
) -> None:
    await sql(database_url, "INSERT INTO users (id, email) VALUES ('ada', NULL), ('bob', 'old@b'), ('eve', 'eve@b')")
    await write_emails(database, {"zoe": "zoe@b", "ada": "ada@b", "bob": "bob@b"})
    assert await emails(database_url) == {"ada": "ada@b", "bob": "bob@b", "eve": "eve@b", "zoe": "zoe@b"}


async def test_a_row_that_has_the_address_already_is_not_written(database: Database, database_url: str) -> None:
    statement = "SELECT xmin::text || ' ' || xmax::text AS version FROM users"
    await write_emails(database, {"ada": "ada@b"})
    before = await sql(database_url, statement)
    await write_emails(database, {"ada": "ada@b"})
    assert await sql(database_url, statement) == before


async def test_two_nodes_that_write_the_same_users_never_wait_for_each_other_in_a_circle(
    database: Database, database_url: str
) -> None:
    """The first waits for the first user's row, which a third transaction holds: it must hold none of the others."""
    users = [f"user{number}" for number in range(20)]
    await write_emails(database, dict.fromkeys(users, "old@b"))
    third = await asyncpg.connect(database_url)
    free = await asyncpg.connect(database_url)
    try:
        holding = third.transaction()
        await holding.start()
        await third.execute("SELECT FROM users WHERE id = 'user0' FOR UPDATE")
        backwards = dict.fromkeys(reversed(users), "new@b")
        writing = asyncio.create_task(write_emails(database, backwards, within_seconds=5.0))
        await eventually(waits_for_a_lock(database_url))
        locked = await free.fetch("SELECT id FROM users WHERE id <> 'user0' FOR UPDATE SKIP LOCKED")
        assert len(locked) == len(users) - 1
        await holding.commit()
        await writing
    finally:
        await third.close()
        await free.close()
    assert set((await emails(database_url)).values()) == {"new@b"}


async def make_conversation(database_url: str, user_id: str) -> None:
    await sql(database_url, "INSERT INTO users (id) VALUES ($1) ON CONFLICT DO NOTHING", user_id)
    await sql(database_url, "INSERT INTO conversations (id, user_id) VALUES (gen_random_uuid(), $1)", user_id)


async def make_ticket(database: Database, hash: str, user_id: str) -> None:
    await add_ticket(
        database, hash, user_id, token_expires_at=4e9, issued_at=NOW, limits="{}", lasts_seconds=30.0, tickets_max=10
    )


async def test_a_user_goes_with_the_tickets_and_nobody_else(database: Database, database_url: str) -> None:
    await write_emails(database, {"ada": "ada@b", "bob": "bob@b"})
    for hash, user_id in (("1", "ada"), ("2", "ada"), ("3", "bob")):
        await make_ticket(database, hash, user_id)
    assert await delete_user(database, "ada") == (True, 2)
    assert await emails(database_url) == {"bob": "bob@b"}
    assert [row["hash"] for row in await sql(database_url, "SELECT hash FROM tickets")] == ["3"]
    assert await delete_user(database, "ada") == (True, 0)


async def test_a_user_who_has_a_conversation_stays(database: Database, database_url: str) -> None:
    await make_conversation(database_url, "ada")
    assert await delete_user(database, "ada") == (False, 0)
    assert list(await emails(database_url)) == ["ada"]


async def test_a_conversation_that_is_made_while_its_user_is_deleted_keeps_the_user(
    database: Database, database_url: str
) -> None:
    await write_emails(database, {"ada": "ada@b"})
    await make_ticket(database, "1", "ada")
    connection = await asyncpg.connect(database_url)
    try:
        making = connection.transaction()
        await making.start()
        await connection.execute("INSERT INTO conversations (id, user_id) VALUES (gen_random_uuid(), 'ada')")
        deleting = asyncio.create_task(delete_user(database, "ada"))
        await eventually(waits_for_a_lock(database_url))
        await making.commit()
        assert await deleting == (False, 0)
    finally:
        await connection.close()
    assert list(await emails(database_url)) == ["ada"]


async def test_an_address_of_a_token_that_was_revoked_makes_no_deleted_user_again(
    database: Database, database_url: str
) -> None:
    await write_emails(database, {"ada": "ada@b", "bob": "bob@b"})
    await sql(database_url, "DELETE FROM users WHERE id = 'ada'")
    await write_emails(database, {"ada": "ada@b", "bob": "new@b"})
    assert await emails(database_url) == {"bob": "new@b"}
    await write_emails(database, {"ada": "ada@b"}, issued_at=time.time() + 1)
    assert await emails(database_url) == {"ada": "ada@b", "bob": "new@b"}
