"""The configured database, where what is wrong with it is one line."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import asyncpg

from anynode.models.database import BadDatabaseUrl, normalise_url
from anynode.models.migrate import SchemaBehind
from anynode.server.errors import ConfigurationError

Result = TypeVar("Result")


def on_database(url: str | None, work: Callable[[str], Coroutine[Any, Any, Result]]) -> Result:
    """Run `work(url)` to its end. Raises ConfigurationError."""
    with explained():
        return asyncio.run(work(normalise_url(configured(url))))


def configured(url: str | None) -> str:
    """The URL, which must be there. Raises ConfigurationError."""
    if url is None:
        raise ConfigurationError("DATABASE_URL is not set: set it to postgresql://user:password@host:port/database")
    return url


@contextmanager
def explained() -> Iterator[None]:
    """Make a ConfigurationError of what people must change before the database can be used."""
    try:
        yield
    except SchemaBehind as error:
        raise ConfigurationError(f"the database's schema is behind ({error}): run `anynode migrate`") from error
    except BadDatabaseUrl as error:
        raise ConfigurationError(f"DATABASE_URL is not one of Postgres: {error}") from error
    except (OSError, TimeoutError, ValueError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigurationError(f"Postgres cannot be used at DATABASE_URL: {reason}") from error
