"""The connections to Postgres: opened late, checked once, and with prepared statements only where those survive."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from anynode.models.database import Database, Unavailable
from anynode.models.ids import uuid7
from anynode.models.queries import bind
from anynode.models.schema_version import SchemaBehind
from tests.kit.harness import free_port, with_database
from tests.kit.pgbouncer import PgBouncer, running_pgbouncer

NO_STATES = bind("turn_states", turn_ids=[])
PREPARED = "SELECT name FROM pg_prepared_statements WHERE statement NOT LIKE '%pg_prepared_statements%'"


@pytest.fixture(scope="module")
def pgbouncer(postgres_url: str) -> Iterator[PgBouncer]:
    with running_pgbouncer(postgres_url, pool_size=2) as running:
        yield running


@asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[Database]:
    database = await Database.connect(url, pool_max=1, **options)
    try:
        yield database
    finally:
        await database.close()


def with_parameter(url: str, parameter: str) -> str:
    return url + ("&" if "?" in url else "?") + parameter


async def is_preparing(database: Database) -> bool:
    """Whether a statement is still there, by its name, after it has run."""
    await database.run(bind("find_conversation", user_id="nobody", client_id="none", conversation_id=None))
    return bool(await database._lines["requests"].run(PREPARED, (), 5.0))


async def test_a_direct_connection_is_none_of_a_pooler_and_prepares(database_url: str) -> None:
    async with opened(database_url) as database:
        assert database.is_pooled is None
        assert await is_preparing(database)
        assert database.is_pooled is False


@pytest.mark.parametrize("line", ["requests", "journal", "beat", "watch"])
async def test_a_pooler_is_found_out_before_the_first_statement_of_any_line(
    pgbouncer: PgBouncer, database_url: str, line: Any
) -> None:
    async with opened(pgbouncer.url(database_url)) as database:
        await database.run(bind("turn_states", turn_ids=[uuid7()]), line=line)
        assert database.is_pooled is True


async def test_behind_a_pooler_nothing_is_prepared(pgbouncer: PgBouncer, database_url: str) -> None:
    async with opened(pgbouncer.url(database_url)) as database:
        for _ in range(5):
            assert not await is_preparing(database)


@pytest.mark.parametrize("parameter", ["pgbouncer=true", "statement_cache_size=0"])
async def test_a_url_that_says_so_is_believed_also_of_a_direct_connection(database_url: str, parameter: str) -> None:
    async with opened(with_parameter(database_url, parameter)) as database:
        assert database.is_pooled is True
        assert not await is_preparing(database)
        assert database.is_pooled is True


async def test_an_error_of_the_server_leaves_the_connection_as_good_as_before(
    pgbouncer: PgBouncer, database_url: str
) -> None:
    async with opened(pgbouncer.url(database_url)) as database:
        line = database._lines["journal"]
        for wrong in ("SELECT nothing", "SELECT 1 / 0"):  # one is found when it is described, one when it is run
            with pytest.raises(asyncpg.PostgresError):
                await line.run(wrong, (), 5.0)
        assert [tuple(row) for row in await line.run("SELECT $1::int", (7,), 5.0)] == [(7,)]


async def test_it_needs_no_server_before_the_first_statement() -> None:
    async with opened(f"postgresql://u@127.0.0.1:{free_port()}/db") as database:
        assert not await database.is_reachable()
        with pytest.raises(Unavailable):
            await database.contact()
        with pytest.raises(Unavailable):
            await database.run(NO_STATES, within_seconds=0.1)


async def test_no_statement_runs_before_the_check_has_passed_and_then_it_is_not_asked_again(database_url: str) -> None:
    checks = 0

    async def check(url: str) -> None:
        nonlocal checks
        checks += 1
        if checks < 5:
            raise SchemaBehind("0003_more")

    async with opened(database_url, check=check) as database:
        with pytest.raises(SchemaBehind):
            await database.contact()
        with pytest.raises(SchemaBehind):
            await database.run(NO_STATES, line="requests")
        with pytest.raises(SchemaBehind):
            await database.run(NO_STATES, line="beat")
        assert not await database.is_reachable()
        await asyncio.gather(*(database.run(NO_STATES) for _ in range(5)))
        assert checks == 5


async def test_a_parameter_that_no_server_can_fix_is_no_unavailability() -> None:
    async with opened("postgresql://u@127.0.0.1/db?sslmode=perhaps") as database:
        with pytest.raises(ValueError, match="sslmode"):
            await database.contact()


async def test_a_refused_login_is_no_unavailability(postgres_url: str) -> None:
    async with opened(with_database(postgres_url, "nowhere")) as database:
        with pytest.raises(asyncpg.InvalidCatalogNameError):
            await database.contact()
