"""The connections to Postgres: timeouts that hold, and repetition of what a broken connection left unknown.

A pool serves requests. The journal and the beat have a connection of their own each, so that a crowd of requests
cannot keep a running turn from being committed or its lease from being renewed.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import asyncpg

from models.queries import query

ATTEMPT_SECONDS_MAX = 10.0  # one attempt; a stalled server is given up by then and its connection closed
_BACKOFF_SECONDS = (0.02, 0.5)  # the first and the longest wait between attempts
_OPTIONS: dict[str, Any] = {"timeout": 5.0, "server_settings": {"application_name": "anynode"}}

# What says that the server, not the statement, is the trouble: repeating an idempotent statement is right.
UNAVAILABLE: tuple[type[BaseException], ...] = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # asyncpg when its connection breaks in the middle of a statement's end
    asyncpg.PostgresConnectionError,  # class 08
    asyncpg.OperatorInterventionError,  # class 57: shutdown, crash, starting up, statement cancelled
    asyncpg.InsufficientResourcesError,  # class 53: too many connections, disk full
    asyncpg.ReadOnlySQLTransactionError,  # 25006: still connected to what became a standby
    asyncpg.DeadlockDetectedError,  # 40P01
)

# Parameters of a URL that are meant for other clients, and what asyncpg would take for server settings.
_FOREIGN_PARAMETERS = frozenset(
    {
        *("channel_binding", "gssencmode", "tcp_user_timeout"),
        *("connect_timeout", "keepalives", "keepalives_count", "keepalives_idle", "keepalives_interval"),
        *("connection_limit", "pgbouncer", "pool_mode", "pool_timeout", "schema", "socket_timeout"),
        *("prepared_statements", "statement_cache_size"),
    }
)


class Unavailable(Exception):
    """Postgres could not be reached, or did not answer, in the time given."""


class BadDatabaseUrl(ValueError):
    """The URL is not one of a Postgres database; the message says why."""


def normalise_url(url: str) -> str:
    """`url` as asyncpg takes it. Raises BadDatabaseUrl; the message never shows the password."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        # The error itself would show a part of the URL, which may be the password.
        raise BadDatabaseUrl("it cannot be read as a URL; percent-encode the user and the password") from None
    if parts.scheme not in ("postgres", "postgresql"):
        raise BadDatabaseUrl(f"it must begin with postgresql://, not {parts.scheme or 'nothing'}://")
    parameters = parse_qsl(parts.query, keep_blank_values=True)
    kept = [(name, value) for name, value in parameters if name not in _FOREIGN_PARAMETERS]
    if not parts.path.strip("/") and not {"dbname", "database"} & {name for name, _ in kept}:
        raise BadDatabaseUrl("it names no database: add /name")
    return urlunsplit(("postgresql", parts.netloc, parts.path, urlencode(kept), ""))


class Line(Protocol):
    """A way to Postgres on which statements run."""

    async def run(self, sql: str, arguments: Sequence[Any], seconds: float) -> list[asyncpg.Record]:
        """Run one statement; within so many seconds it has ended, or its connection has."""

    async def close(self) -> None:
        """Close its connections; the owner bounds how long that may take."""

    def terminate(self) -> None:
        """Cut its connections."""


class Database:
    """The lines to one Postgres; made by `connect`, ended by `close`.

    The statements of the journal and of the beat have a line of their own each.
    """

    def __init__(self, requests: Line, journal: Line, beat: Line) -> None:
        self._lines: Mapping[str, Line] = {"requests": requests, "journal": journal, "beat": beat}

    @classmethod
    async def connect(cls, url: str, *, pool_max: int) -> Database:
        """Open the first connections. Raises Unavailable, or asyncpg's errors when the server refuses the login."""
        dsn = normalise_url(url)
        try:
            async with asyncio.timeout(ATTEMPT_SECONDS_MAX):
                pool = await asyncpg.create_pool(dsn, min_size=1, max_size=pool_max, reset=_keep, **_OPTIONS)
        except UNAVAILABLE as error:
            raise Unavailable(f"{type(error).__name__}: {error}") from error
        return cls(_PoolLine(pool), _SingleLine(dsn), _SingleLine(dsn))

    async def close(self) -> None:
        """Close all connections; what is still under way after 5 s is cut."""
        for line in self._lines.values():
            try:
                async with asyncio.timeout(5):
                    await line.close()
            except TimeoutError:
                line.terminate()

    async def fetch(
        self,
        name: str,
        *arguments: Any,
        within_seconds: float = 5.0,
        line: Literal["requests", "journal", "beat"] = "requests",
    ) -> list[asyncpg.Record]:
        """Run the named statement, again and again while the server is away. Raises Unavailable after `within_seconds`.

        The outcome of a failed attempt is unknown, so the statement must be one that may be repeated.
        """
        now = asyncio.get_running_loop().time
        deadline = now() + within_seconds
        pause = _BACKOFF_SECONDS[0]
        while True:
            try:
                return await self._lines[line].run(query(name), arguments, min(deadline - now(), ATTEMPT_SECONDS_MAX))
            except UNAVAILABLE as error:
                if deadline - now() <= pause:
                    raise Unavailable(f"{type(error).__name__}: {error}") from error
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311
            pause = min(pause * 2, _BACKOFF_SECONDS[1])

    async def is_reachable(self) -> bool:
        """Whether Postgres answers within 2 s."""
        try:
            await self._lines["requests"].run("SELECT 1", (), 2.0)
        except UNAVAILABLE:
            return False
        return True


class _PoolLine:
    """Many statements at once."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def run(self, sql: str, arguments: Sequence[Any], seconds: float) -> list[asyncpg.Record]:
        async with asyncio.timeout(seconds):
            connection = await self._pool.acquire()
            try:
                return await _fetch(connection, sql, arguments)
            finally:
                await self._pool.release(connection)

    async def close(self) -> None:
        await self._pool.close()

    def terminate(self) -> None:
        self._pool.terminate()


class _SingleLine:
    """One statement at a time, on a connection that is opened when it is needed; cheaper than a pool's."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._connection: asyncpg.Connection | None = None
        self._turn = asyncio.Lock()

    async def run(self, sql: str, arguments: Sequence[Any], seconds: float) -> list[asyncpg.Record]:
        async with asyncio.timeout(seconds), self._turn:
            if self._connection is None or self._connection.is_closed():
                self._connection = await asyncpg.connect(self._dsn, **_OPTIONS)
            return await _fetch(self._connection, sql, arguments)

    async def close(self) -> None:
        if self._connection is not None:
            await self._connection.close()

    def terminate(self) -> None:
        if self._connection is not None:
            self._connection.terminate()


async def _fetch(connection: Any, sql: str, arguments: Sequence[Any]) -> list[asyncpg.Record]:
    try:
        rows: list[asyncpg.Record] = await connection.fetch(sql, *arguments)
    except BaseException as error:
        # asyncpg would wait for the server to confirm a cancelled statement; a server that does not answer would
        # then hold the connection for ever. An error that the server itself reported is harmless,
        # unless it is the last thing that it says.
        if not isinstance(error, asyncpg.PostgresError) or isinstance(error, asyncpg.OperatorInterventionError):
            connection.terminate()
        raise
    return rows


async def _keep(connection: asyncpg.Connection) -> None:
    """No statement of ours leaves session state behind, so a connection needs no reset between two uses."""
