"""Starting a command: the configured database, and one line that says what is wrong with the configuration."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

import asyncpg
import click

from anynode.models.database import Database, Unavailable
from anynode.models.database_url import BadDatabaseUrl, normalise_url
from anynode.models.postgres_errors import describe
from anynode.models.schema_version import SchemaBehind, check_schema
from anynode.server.errors import ConfigurationError

Result = TypeVar("Result")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print a ConfigurationError as one line, and exit with status 2."""
    try:
        yield
    except ConfigurationError as error:
        click.secho(f"anynode: {error}", fg="red", err=True)
        sys.exit(2)


def on_database(url: str | None, work: Callable[[str], Coroutine[Any, Any, Result]]) -> Result:
    """Return what `work(url)` returns, run to its end. Raises ConfigurationError."""
    with explain_database_errors():
        return asyncio.run(work(normalise_url(require_url(url))))


@asynccontextmanager
async def open_database(url: str | None) -> AsyncIterator[Database]:
    """Open the database for a command that makes one request after the other. Raises ConfigurationError."""
    try:
        database = await connect_database(require_url(url), pool_max=1)
    except Unavailable as error:
        raise ConfigurationError(f"Postgres cannot be reached at DATABASE_URL: {error}") from error
    try:
        yield database
    finally:
        await database.close()


async def connect_database(url: str, *, pool_max: int, source: str = "DATABASE_URL") -> Database:
    """Return a database that answers, and that has the schema; `source` has the URL. Its requests come first: the other
    lines are opened when they are needed. Raises ConfigurationError, or Unavailable where Postgres does not answer."""
    with explain_database_errors(source):
        database = await Database.connect(url, pool_max=pool_max, check=check_schema)
        try:
            await database.contact("requests")
        except BaseException:
            await database.close()
            raise
    return database


def require_url(url: str | None) -> str:
    """Return the URL. Raises ConfigurationError where none is set."""
    if url is None:
        raise ConfigurationError("DATABASE_URL is not set: set it to postgresql://user:password@host:port/database")
    return url


@contextmanager
def explain_database_errors(source: str = "DATABASE_URL") -> Iterator[None]:
    """Turn an error of the database into a ConfigurationError that says what to change; `source` has the URL."""
    try:
        yield
    except SchemaBehind as error:
        raise ConfigurationError(f"the database's schema is behind ({error}): run `anynode migrate`") from error
    except BadDatabaseUrl as error:
        raise ConfigurationError(f"{source} is not a Postgres URL: {error}") from error
    except (OSError, TimeoutError, ValueError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        reason = describe(error) or type(error).__name__
        raise ConfigurationError(f"Postgres cannot be used at {source}: {reason}") from error
