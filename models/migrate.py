"""Brings the schema up to date, one process at a time, and tells when it is behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import asyncpg
from tortoise import Tortoise
from tortoise.backends.asyncpg.client import AsyncpgDBClient
from tortoise.migrations.api import migrate as apply_migrations
from tortoise.migrations.loader import MigrationLoader

from models.database import normalise_url

APP = "models"
_LOCK = 0x616E796E6F6465  # "anynode"


async def migrate(url: str, *, progress: Callable[[str], object] = lambda name: None) -> list[str]:
    """Apply what is missing; returns the names of the applied migrations. Any number may run at once.

    The lock is held by an open transaction on a connection of its own, so that it also holds behind a pooler.
    """
    applied: list[str] = []

    def report(event: str, app: str, name: str) -> None:
        if event == "apply_done":
            applied.append(name)
            progress(name)

    dsn = normalise_url(url)
    lock = await asyncpg.connect(dsn, timeout=10, statement_cache_size=0)
    try:
        async with lock.transaction():
            await lock.execute(f"SELECT pg_advisory_xact_lock({_LOCK})")
            try:
                await apply_migrations(config=_config(dsn), progress=report)
            finally:
                await Tortoise.close_connections()
    finally:
        await lock.close(timeout=5)
    return applied


async def missing_migrations(url: str) -> list[str]:
    """The names of the migrations that this code knows and the database has not seen."""
    connection = await asyncpg.connect(normalise_url(url), timeout=10, statement_cache_size=0)
    try:
        exists = await connection.fetchval("SELECT to_regclass('tortoise_migrations') IS NOT NULL")
        rows = await connection.fetch("SELECT name FROM tortoise_migrations WHERE app = $1", APP) if exists else []
    finally:
        await connection.close(timeout=5)
    loader = MigrationLoader({APP: {"migrations": "models.migrations"}}, recorder=None)  # type: ignore[arg-type]
    loader.load_disk()
    return sorted({key.name for key in loader.disk_migrations} - {row["name"] for row in rows})


def _config(dsn: str) -> dict[str, Any]:
    return {
        "connections": {"default": {"engine": __name__, "credentials": {"url": dsn}}},
        "apps": {APP: {"models": ["models.tables"], "migrations": "models.migrations"}},
    }


class client_class(AsyncpgDBClient):  # noqa: N801  (the name that Tortoise looks for in an engine's module)
    """Tortoise's client, but connected by the URL: its own parser knows neither `sslmode` nor unix sockets."""

    async def create_pool(self, **arguments: Any) -> asyncpg.Pool:
        return await asyncpg.create_pool(arguments["url"], min_size=1, max_size=1, statement_cache_size=0)
