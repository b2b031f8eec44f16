"""The connections to Postgres: two pools, timeouts that hold, and repetition of what a broken connection left unknown.

One pool serves requests; a small one of its own is for the journal and the beat, so that a crowd of requests
cannot keep a running turn from being committed or its lease from being renewed.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import asyncpg

from models.queries import query

ATTEMPT_SECONDS_MAX = 10.0  # one attempt; a stalled server is given up by then and its connection closed
_BACKOFF_SECONDS = (0.02, 0.5)  # the first and the longest wait between attempts

# What says that the server, not the statement, is the trouble: repeating an idempotent statement is right.
UNAVAILABLE: tuple[type[BaseException], ...] = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
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


class Database:
    """Two pools of one Postgres; made by `connect`, ended by `close`."""

    def __init__(self, requests: asyncpg.Pool, journal: asyncpg.Pool) -> None:
        self._requests = requests
        self._journal = journal

    @classmethod
    async def connect(cls, url: str, *, pool_max: int) -> Database:
        """Open the pools. Raises Unavailable, or asyncpg's errors when the server refuses the login."""
        dsn = normalise_url(url)
        requests = await _open_pool(dsn, 1, pool_max)
        try:
            journal = await _open_pool(dsn, 1, 2)
        except BaseException:
            requests.terminate()
            raise
        return cls(requests, journal)

    async def close(self) -> None:
        """Close all connections; what is still under way after 5 s is cut."""
        for pool in (self._requests, self._journal):
            try:
                async with asyncio.timeout(5):
                    await pool.close()
            except TimeoutError:
                pool.terminate()

    async def fetch(
        self, name: str, *arguments: Any, within_seconds: float = 5.0, for_journal: bool = False
    ) -> list[asyncpg.Record]:
        """Run the named statement, again and again while the server is away. Raises Unavailable after `within_seconds`.

        The outcome of a failed attempt is unknown, so the statement must be one that may be repeated.
        """
        pool = self._journal if for_journal else self._requests
        deadline = asyncio.get_running_loop().time() + within_seconds
        pause = _BACKOFF_SECONDS[0]
        while True:
            remaining = deadline - asyncio.get_running_loop().time()
            try:
                return await _attempt(pool, query(name), arguments, min(remaining, ATTEMPT_SECONDS_MAX))
            except UNAVAILABLE as error:
                remaining = deadline - asyncio.get_running_loop().time()
                if remaining <= pause:
                    raise Unavailable(f"{type(error).__name__}: {error}") from error
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311
            pause = min(pause * 2, _BACKOFF_SECONDS[1])

    async def is_reachable(self) -> bool:
        """Whether Postgres answers within 2 s."""
        try:
            await _attempt(self._journal, "SELECT 1", (), 2.0)
        except UNAVAILABLE:
            return False
        return True


async def _attempt(pool: asyncpg.Pool, sql: str, arguments: Sequence[Any], seconds: float) -> list[asyncpg.Record]:
    async with asyncio.timeout(max(seconds, 0.001)):
        connection = await pool.acquire()
        try:
            rows: list[asyncpg.Record] = await connection.fetch(sql, *arguments)
        except BaseException as error:
            # asyncpg would wait for the server to confirm a cancelled statement; a server that does not answer
            # would then hold the pool's place for ever. An error that the server itself reported is harmless.
            if not isinstance(error, asyncpg.PostgresError):
                connection.terminate()
            raise
        finally:
            await asyncio.shield(pool.release(connection))
        return rows


async def _open_pool(dsn: str, size_min: int, size_max: int) -> asyncpg.Pool:
    try:
        async with asyncio.timeout(ATTEMPT_SECONDS_MAX):
            return await asyncpg.create_pool(
                dsn,
                min_size=size_min,
                max_size=size_max,
                timeout=5.0,
                reset=_keep,
                server_settings={"application_name": "anynode"},
            )
    except UNAVAILABLE as error:
        raise Unavailable(f"{type(error).__name__}: {error}") from error


async def _keep(connection: asyncpg.Connection) -> None:
    """No statement of ours leaves session state behind, so a connection needs no reset between two uses."""
