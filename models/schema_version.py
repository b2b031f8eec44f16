"""Which migrations a database has seen. Apart from `migrate`, so that serving does not load Tortoise ORM."""

from __future__ import annotations

from pkgutil import iter_modules
from typing import Any, Final

import asyncpg

from anynode.models import migrations
from anynode.models.database import Unavailable
from anynode.models.database_url import normalise_url

APP: Final = "models"  # Tortoise's label of our migrations
OPTIONS: Final[dict[str, Any]] = {"timeout": 10, "statement_cache_size": 0}  # see `database._Source`


class SchemaBehind(Unavailable):
    """The database has not seen all migrations that this code knows; the message names them."""


async def check_schema(url: str) -> None:
    """Raise SchemaBehind if the database has not seen all migrations that this code knows."""
    if missing := await missing_migrations(url):
        raise SchemaBehind(", ".join(missing))


async def missing_migrations(url: str) -> list[str]:
    """Return the names of the migrations that this code knows and the database has not seen."""
    connection = await asyncpg.connect(normalise_url(url), **OPTIONS)
    try:
        exists = await connection.fetchval("SELECT to_regclass('tortoise_migrations') IS NOT NULL")
        rows = await connection.fetch("SELECT name FROM tortoise_migrations WHERE app = $1", APP) if exists else []
    finally:
        await connection.close(timeout=5)
    return sorted({module.name for module in iter_modules(migrations.__path__)} - {row["name"] for row in rows})
