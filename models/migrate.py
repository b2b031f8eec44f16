"""Brings the schema up to date, one process at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import asyncpg
from tortoise import Tortoise
from tortoise.backends.asyncpg.client import AsyncpgDBClient
from tortoise.migrations.executor import MigrationExecutor
from tortoise.migrations.schema_editor import AsyncpgSchemaEditor
from tortoise.transactions import in_transaction

from anynode.models.database_url import normalise_url
from anynode.models.schema_version import APP, OPTIONS

_LOCK = 0x616E796E6F6465  # "anynode"
_APPS: dict[str, dict[str, Any]] = {
    APP: {"models": ["anynode.models.tables"], "migrations": "anynode.models.migrations"}
}


async def migrate(url: str, *, progress: Callable[[str], object] = lambda name: None) -> list[str]:
    """Apply all missing migrations or none, and return their names. Any number of processes may do so at once.

    The lock and the work share one transaction. So the lock also holds behind a pooler; and processes that wait there
    for the lock cannot have taken the last connection, which its holder would need for the work.
    """
    applied: list[str] = []

    def report(event: str, app: str, name: str) -> None:
        if event == "apply_done":
            applied.append(name)

    await Tortoise.init(config=tortoise_config(url), init_connections=False)
    try:
        async with in_transaction("default") as client:
            await client.execute_script(f"SELECT pg_advisory_xact_lock({_LOCK})")
            executor = MigrationExecutor(client, _APPS)
            # The recorder would read its table before it makes it, and that error would end the transaction.
            await executor.recorder.ensure_schema(AsyncpgSchemaEditor(client, atomic=False))
            await executor.migrate(progress=report)
    finally:
        await Tortoise.close_connections()
    for name in applied:
        progress(name)
    return applied


def tortoise_config(url: str) -> dict[str, Any]:
    """Return the configuration with which `Tortoise.init` reaches the models. Raises BadDatabaseUrl."""
    connections = {"default": {"engine": __name__, "credentials": {"url": normalise_url(url)}}}
    return {"connections": connections, "apps": _APPS}


class client_class(AsyncpgDBClient):  # noqa: N801  (the name that Tortoise looks for in an engine's module)
    """Tortoise's client, connected by the URL as asyncpg reads it: Tortoise's own parser knows neither `sslmode` nor
    unix sockets. Where it cannot connect, the errors are asyncpg's."""

    async def create_connection(self, with_db: bool) -> None:
        self._pool = await asyncpg.create_pool(self.extra["url"], min_size=1, max_size=1, **OPTIONS)
        await self._post_connect()
