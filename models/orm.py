"""Reads with the models of `tables`, over the connections of a `Database`.

Tortoise would open connections of its own, without the time-outs, the repetition and the detection of poolers that
`database` has. So its client is replaced by one that runs each query as any other statement is run. It only reads: what
changes a conversation must hold the conversation's lock, which the functions in `functions/` do.

Tortoise keeps its state in a context variable. `Orm.reading` sets it for a moment, so that an application that uses
Tortoise for itself keeps its own connections.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Final, NoReturn

from tortoise.apps import Apps
from tortoise.backends.asyncpg.client import AsyncpgDBClient
from tortoise.connection import get_connections
from tortoise.context import TortoiseContext

from anynode.models import tables
from anynode.models.database import Database
from anynode.models.queries import Bound
from anynode.models.schema_version import APP

READ_SECONDS_MAX: Final = 10.0  # one query, with what it waits for a Postgres that is away
_CONNECTION: Final = "default"  # the name that Tortoise gives to a connection unless it is told another one


class Orm:
    """The models' way to one database."""

    def __init__(self, database: Database) -> None:
        self._client = _ReadingClient(database)
        with self.reading():
            _prepare_models()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Let the models read this database while the context lasts, in the current task.

        Queries raise Unavailable. What would write raises TypeError.
        """
        with TortoiseContext() as context:
            before = context.connections.set(_CONNECTION, self._client)
            try:
                yield
            finally:
                context.connections.reset(before)


class _ReadingClient(AsyncpgDBClient):
    """A client of Tortoise that runs queries over the connections of a `Database`, and refuses anything else."""

    def __init__(self, database: Database) -> None:
        super().__init__(connection_name=_CONNECTION)
        self._database = database

    async def execute_query(self, query: str, values: list[Any] | None = None) -> tuple[int, Sequence[Any]]:  # type: ignore[override]
        if not query.lstrip().upper().startswith("SELECT"):
            _refuse()
        rows = await self._database.run(Bound(query, tuple(values or ())), within_seconds=READ_SECONDS_MAX)
        return len(rows), rows

    async def execute_query_dict(self, query: str, values: list[Any] | None = None) -> list[dict[str, Any]]:
        _, rows = await self.execute_query(query, values)
        return [dict(row) for row in rows]

    async def execute_insert(self, query: str, values: list[Any]) -> NoReturn:
        _refuse()

    async def execute_many(self, query: str, values: list[list[Any]]) -> NoReturn:
        _refuse()

    async def execute_script(self, query: str) -> NoReturn:
        _refuse()

    def _in_transaction(self) -> NoReturn:
        _refuse()


def _refuse() -> NoReturn:
    raise TypeError("The models only read; use the methods of Store to change something.")


@cache
def _prepare_models() -> None:
    """Resolve the models' relations, once in a process and in a context that has a connection. `Tortoise.init` does the
    same, but also changes what all contexts of a process share: its routers, and two environment variables."""
    Apps({APP: {"models": [tables]}}, get_connections())
