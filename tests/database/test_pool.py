"""The pool of connections: what a cancelled statement costs, and how much of it one user may have."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest

from anynode.models.database import Database, Unavailable
from anynode.models.queries import Bound
from tests.agents.scripted import eventually

POOL_MAX = 4
SHARE = 2
BLOCKED = "SELECT pg_advisory_xact_lock(1), pg_backend_pid() AS pid"
BACKEND = Bound("SELECT pg_backend_pid() AS pid", (), "bob")


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    database = await Database.connect(database_url, pool_max=POOL_MAX)
    yield database
    await database.close()


@pytest.fixture
async def lock(database_url: str) -> AsyncIterator[Lock]:
    """A lock that is held, on which the statements `BLOCKED` wait."""
    connection = await asyncpg.connect(database_url)
    try:
        await connection.execute("SELECT pg_advisory_lock(1)")
        yield Lock(connection)
    finally:
        await connection.close()


class Lock:
    """A lock in Postgres that this test holds."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection

    async def waited_for(self, count: int) -> None:
        """Wait until this number of statements wait."""
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )

        async def are_waiting() -> bool:
            return bool(await self._connection.fetchval(waiting) == count)

        await eventually(are_waiting)

    async def release(self) -> None:
        await self._connection.execute("SELECT pg_advisory_unlock(1)")


def blocked(user_id: str | None, number: int = 0) -> Bound:
    return Bound(f"{BLOCKED}, {number}", (), user_id)


async def cancelled(task: asyncio.Task[list[asyncpg.Record]]) -> None:
    """Cancel a task, which ends at once."""
    task.cancel()
    async with asyncio.timeout(1):
        await asyncio.wait((task,))
    assert task.cancelled()


async def backends(database: Database) -> set[int]:
    """The connections that the pool has at this moment, as all of it is used at once."""
    users = [f"user-{number}" for number in range(POOL_MAX)]
    sql = "SELECT pg_backend_pid() AS pid, pg_sleep(0.05)"
    answers = await asyncio.gather(*(database.run(Bound(sql, (), user)) for user in users))
    return {rows[0]["pid"] for rows in answers}


async def test_a_statement_whose_caller_is_cancelled_gives_its_connection_back(database: Database, lock: Lock) -> None:
    before = await backends(database)
    tasks = [asyncio.create_task(database.run(blocked("ada"))) for _ in range(SHARE)]
    await lock.waited_for(SHARE)
    for task in tasks:
        await cancelled(task)
    await lock.release()
    assert await backends(database) == before


async def test_a_statement_that_waits_for_a_connection_is_not_sent_once_its_caller_is_cancelled(
    database: Database, lock: Lock
) -> None:
    users = [f"user-{number}" for number in range(POOL_MAX)]
    running = [asyncio.create_task(database.run(blocked(user))) for user in users]
    await lock.waited_for(POOL_MAX)
    sent: list[str] = []
    unsent = asyncio.create_task(database.run(BACKEND, on_sent=lambda: sent.append("unsent")))
    await asyncio.sleep(0)
    await cancelled(unsent)
    last = asyncio.create_task(database.run(BACKEND, on_sent=lambda: sent.append("last")))
    await lock.release()
    await asyncio.gather(*running, last)
    assert sent == ["last"]


async def test_a_statement_whose_caller_is_cancelled_ends_with_the_time_of_its_attempt(
    database: Database, lock: Lock
) -> None:
    before = await backends(database)
    running = asyncio.create_task(database.run(blocked("ada"), attempt_seconds=0.2))
    await lock.waited_for(1)
    await cancelled(running)
    # Its connection is closed, as the server may not answer at all; a pool with one that is in use would wait for it.
    async with asyncio.timeout(5):
        found = await backends(database)
    assert len(found & before) == POOL_MAX - 1
    await lock.release()


async def test_one_user_who_takes_all_there_is_leaves_the_others_their_connections(
    database: Database, lock: Lock
) -> None:
    greedy = [asyncio.create_task(database.run(blocked("ada", number))) for number in range(20)]
    await lock.waited_for(SHARE)
    async with asyncio.timeout(1):
        await database.run(BACKEND)
        await asyncio.gather(*(database.run(Bound("SELECT 1", (), None)) for _ in range(10)))
    await lock.waited_for(SHARE)
    await lock.release()
    await asyncio.gather(*greedy)


async def test_a_cancelled_statement_counts_towards_the_share_until_it_has_ended(
    database: Database, lock: Lock
) -> None:
    for _ in range(3):
        tasks = [asyncio.create_task(database.run(blocked("ada"))) for _ in range(SHARE)]
        await lock.waited_for(SHARE)
        for task in tasks:
            await cancelled(task)
    await lock.release()
    async with asyncio.timeout(1):
        await database.run(blocked("ada"))


async def test_a_statement_waits_for_its_users_share_no_longer_than_it_may_take(database: Database, lock: Lock) -> None:
    greedy = [asyncio.create_task(database.run(blocked("ada"))) for _ in range(SHARE)]
    await lock.waited_for(SHARE)
    with pytest.raises(Unavailable, match="other statements of this user are in its way"):
        await database.run(Bound("SELECT 1", (), "ada"), within_seconds=0.05)
    await lock.release()
    await asyncio.gather(*greedy)


async def test_an_error_of_the_server_gives_the_share_back(database: Database) -> None:
    for _ in range(SHARE + 1):
        with pytest.raises(asyncpg.DivisionByZeroError):
            await database.run(Bound("SELECT 1 / 0", (), "ada"))
