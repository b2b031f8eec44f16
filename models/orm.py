"""Reads with the models of `tables`, over the connections of a `Database`.

Tortoise would open connections of its own, without the time-outs, the repetition and the detection of poolers that
`database` has. So its client is replaced by one that runs each query as any other statement is run. It only reads: what
changes a conversation must hold the conversation's lock, which the functions in `functions/` do.

Tortoise keeps its state in a context variable. `Orm.reading` sets it for a moment. The models have a connection with a
name of its own, and all other names lead to the connections of an application that uses Tortoise for itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Final, NoReturn

from tortoise.apps import Apps
from tortoise.backends.asyncpg.client import AsyncpgDBClient
from tortoise.backends.base.client import BaseDBAsyncClient
from tortoise.connection import ConnectionHandler, ConnectionToken, get_connections
from tortoise.context import TortoiseContext, get_current_context

from anynode.models import tables
from anynode.models.database import Database
from anynode.models.queries import Bound
from anynode.models.schema_version import APP

READ_SECONDS_MAX: Final = 10.0  # one query, with what it waits for a Postgres that is away
_CONNECTION: Final = "anynode"  # the name of the models' connection; Tortoise calls an application's own "default"


class Orm:
    """The models' way to one database. `client` runs their queries."""

    def __init__(self, database: Database) -> None:
        self.client: BaseDBAsyncClient = _ReadingClient(database)
        with self.reading():
            _prepare_models()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Let the models read this database while the context lasts, in the current task. Other models go on using the
        connections of the application.

        Queries raise Unavailable. What would write raises TypeError.
        """
        with _ReadingContext(self.client, get_current_context()):
            yield


class _ReadingContext(TortoiseContext):
    """A context whose connections are those of an outer one, where there is one, and the models' own."""

    def __init__(self, client: BaseDBAsyncClient, outer: TortoiseContext | None) -> None:
        super().__init__()
        if outer is not None:
            self._apps, self._inited, self._routers = outer.apps, outer.inited, outer.routers
            self._use_tz, self._timezone = outer.use_tz, outer.timezone
        self._connections = _Connections(client, None if outer is None else outer.connections)


class _Connections(ConnectionHandler):
    """The models' own connection, by its name; all else is that of an outer handler."""

    def __init__(self, client: BaseDBAsyncClient, outer: ConnectionHandler | None) -> None:
        super().__init__()
        self._client = client
        self._outer = outer

    @property
    def db_config(self) -> Any:
        return {_CONNECTION: {}} if self._outer is None else self._outer.db_config

    def get(self, conn_alias: str) -> BaseDBAsyncClient:
        # An application that has the models in its own Tortoise too has given their connection another name.
        if self._outer is None or conn_alias in (_CONNECTION, tables.Conversation._meta.default_connection):
            return self._client
        return self._outer.get(conn_alias)

    def set(self, conn_alias: str, conn_obj: BaseDBAsyncClient) -> ConnectionToken:
        return super().set(conn_alias, conn_obj) if self._outer is None else self._outer.set(conn_alias, conn_obj)

    def reset(self, token: ConnectionToken | None) -> None:
        super().reset(token) if self._outer is None else self._outer.reset(token)


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
    Apps({APP: {"models": [tables], "default_connection": _CONNECTION}}, get_connections())
