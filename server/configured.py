"""Short work on the configured database, whose failures are one line each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import asyncpg

from models.database import BadDatabaseUrl, normalise_url
from server.errors import ConfigurationError

Result = TypeVar("Result")


def on_database(url: str | None, work: Callable[[str], Coroutine[Any, Any, Result]]) -> Result:
    """Run `work(url)` to its end. Raises ConfigurationError."""
    if url is None:
        raise ConfigurationError("DATABASE_URL is not set: set it to postgresql://user:password@host:port/database")
    try:
        return asyncio.run(work(normalise_url(url)))
    except BadDatabaseUrl as error:
        raise ConfigurationError(f"DATABASE_URL is not one of Postgres: {error}") from error
    except (OSError, TimeoutError, ValueError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigurationError(f"Postgres cannot be used at DATABASE_URL: {reason}") from error
