"""The connections to Postgres: time-outs that hold, and repetition of statements that a broken connection left unknown.

A pool serves requests, and each user has a share of it. The journal, the beat and the watch have one connection each,
so that a crowd of requests cannot keep a running turn from being committed, its lease from being renewed, or other
nodes from being heard. A connection is opened when it is needed. Whether a pooler stands in between is found out before
the first statement.

A statement of the pool whose caller is cancelled runs to its end, within the time of its attempt, and gives its
connection and its part of the share back. Clients can ask and go a hundred times a second, and a new connection costs
Postgres a new process. A statement that still waits for a connection then is not sent.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import asyncpg

from anynode.models.database_url import normalise_url, says_pooled
from anynode.models.postgres_errors import describe
from anynode.models.queries import Bound
from anynode.models.shares import Shares, share_of

ATTEMPT_SECONDS_MAX = 10.0  # one attempt; a stalled server is given up by then and its connection closed
CONTACT_SECONDS_MAX = 5.0
READ_BYTES_MAX = 2_097_152  # of content in what a client can cause to be read at once, and two rows at least
_BACKOFF_SECONDS = (0.02, 0.5)  # the first and the longest wait between attempts
_OPTIONS: dict[str, Any] = {"timeout": 5.0, "server_settings": {"application_name": "anynode"}}

# Errors of the server and not of the statement: repeating a statement that may be repeated is right.
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

# A login that worked before and is refused now: somebody changes the password. The first contact, whose login is a
# mistake that waiting does not repair, does not count it among these.
_AWAY: tuple[type[BaseException], ...] = (*UNAVAILABLE, asyncpg.InvalidAuthorizationSpecificationError)  # class 28

_LAST_WORDS = (asyncpg.OperatorInterventionError, asyncpg.PostgresConnectionError)


class Unavailable(Exception):
    """Postgres could not be reached, or did not answer, in the time given; the message says why."""


def _nothing() -> None:
    pass


class Line(Protocol):
    """A connection, or a pool of them, on which statements run."""

    async def run(
        self,
        sql: str,
        arguments: Sequence[Any],
        seconds: float,
        on_sent: Callable[[], object] = _nothing,
        user_id: str | None = None,
    ) -> list[asyncpg.Record]:
        """Run one statement. After `seconds` it has ended, or its connection is closed. `on_sent` is called when a
        connection is there for it. A statement with a `user_id` counts towards this user's share of the connections,
        and waits for it within `seconds`."""

    async def close(self) -> None:
        """Close its connections; the owner bounds how long that may take."""

    def terminate(self) -> None:
        """Cut its connections."""


class Database:
    """The lines to one Postgres; made by `connect`, ended by `close`.

    The statements of the journal, of the beat and of the watch have a line of their own each.
    """

    def __init__(self, source: _Source, requests: Line, journal: Line, beat: Line, watch: Line) -> None:
        self._source = source
        self._lines: Mapping[str, Line] = {"requests": requests, "journal": journal, "beat": beat, "watch": watch}

    @classmethod
    async def connect(
        cls, url: str, *, pool_max: int, check: Callable[[str], Awaitable[None]] | None = None
    ) -> Database:
        """Return a database whose connections are opened when they are needed. Raises BadDatabaseUrl.

        No statement runs before `check(url)` has passed once.
        """
        source = _Source(normalise_url(url), check, is_pooled=says_pooled(url) or None)
        pool = await asyncpg.create_pool(connect=source.connect, min_size=0, max_size=pool_max, reset=_keep)
        singles = [_SingleLine(source) for _ in ("journal", "beat", "watch")]
        return cls(source, _PoolLine(pool, share_of(pool_max)), *singles)

    async def contact(self, *lines: str) -> None:
        """Run the check and open a connection on each of `lines` now (on all, where none is named), before the first
        statement needs them.

        Raises Unavailable, the check's errors, or asyncpg's errors when the server refuses the login.
        """
        try:
            async with asyncio.timeout(CONTACT_SECONDS_MAX):
                await self._source.contact()
                # The first turn should not have to wait for the connections.
                await asyncio.gather(
                    *(self._lines[name].run("SELECT 1", (), CONTACT_SECONDS_MAX) for name in lines or self._lines)
                )
        except UNAVAILABLE as error:
            if isinstance(error, ValueError):  # of a parameter or a certificate: waiting for the server does not help
                raise
            raise _unavailable(error) from error

    @property
    def is_pooled(self) -> bool | None:
        """True if a pooler stands in between; None before the first contact, unless the URL says so."""
        return self._source.is_pooled

    async def close(self) -> None:
        """Close all connections; statements that still run after 5 s are cut off."""

        async def close(line: Line) -> None:
            try:
                async with asyncio.timeout(5):
                    await line.close()
            except TimeoutError:
                line.terminate()

        await asyncio.gather(*(close(line) for line in self._lines.values()))

    async def run(
        self,
        statement: Bound,
        *,
        within_seconds: float = 5.0,
        attempt_seconds: float = ATTEMPT_SECONDS_MAX,
        on_sent: Callable[[], object] = _nothing,
        line: Literal["requests", "journal", "beat", "watch"] = "requests",
    ) -> list[asyncpg.Record]:
        """Run a statement, repeatedly while the server is away. Raises Unavailable after `within_seconds`.

        An attempt is given up after `attempt_seconds`, and its connection is closed. The outcome of a failed attempt is
        unknown, so the statement must be one that may be repeated. `on_sent` is called before each attempt, when a
        connection is there for it. `line` is the connection, or pool of connections, to use. In the pool, the
        statements of one user use at most the user's share of the connections at once; others of the user wait.
        """
        sql, arguments, user_id = statement
        now = asyncio.get_running_loop().time
        deadline = now() + within_seconds
        pause = _BACKOFF_SECONDS[0]
        while True:
            try:
                seconds = min(deadline - now(), attempt_seconds)
                return await self._lines[line].run(sql, arguments, seconds, on_sent, user_id)
            except _AWAY as error:
                if deadline - now() <= pause:
                    raise _unavailable(error) from error
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311
            pause = min(pause * 2, _BACKOFF_SECONDS[1])

    async def is_reachable(self) -> bool:
        """Return whether Postgres answers within 2 s, and the check has passed."""
        try:
            await self._lines["requests"].run("SELECT 1", (), 2.0)
        except _AWAY:
            return False
        except Unavailable:  # the check has not passed
            return False
        return True


class _Source:
    """Opens connections: with prepared statements, unless a pooler stands in between.

    A pooler of transactions may run each transaction on another connection of the server, which does not know the
    statements that were prepared. Without its cache asyncpg sends a statement twice: first to be described, up to a
    Flush, at which a pooler may not yet give the server's connection to another client; then with its arguments, up to
    a Sync. So a statement is one transaction, which the server ends by itself. BEGIN and COMMIT around it would take
    two more round trips, and a node that is stopped before its COMMIT would keep rows locked until it runs again.
    """

    def __init__(self, dsn: str, check: Callable[[str], Awaitable[None]] | None, *, is_pooled: bool | None) -> None:
        self.is_pooled = is_pooled
        self._dsn = dsn
        self._check = check
        self._contacting = asyncio.Lock()

    async def contact(self) -> None:
        async with self._contacting:
            if self._check is not None:
                await self._check(self._dsn)
                self._check = None
            if self.is_pooled is None:
                self.is_pooled = await self._find_out()

    async def connect(self, *_: Any, **__: Any) -> asyncpg.Connection:
        """Open a connection. The arguments are those of the pool, which has none of its own."""
        await self.contact()
        options = {**_OPTIONS, "statement_cache_size": 0} if self.is_pooled else _OPTIONS
        connection: asyncpg.Connection = await asyncpg.connect(self._dsn, **options)
        return connection

    async def _find_out(self) -> bool:
        """Return whether the server process that was announced at login is not the one that answers.

        A pooler cannot know at login which process a client will get, so it announces one that it has made up.
        """
        connection = await asyncpg.connect(self._dsn, **_OPTIONS, statement_cache_size=0)
        try:
            return bool(await connection.fetchval("SELECT pg_backend_pid()") != connection.get_server_pid())
        finally:
            connection.terminate()


class _PoolLine:
    """Many statements at once, each in a task of its own, which goes on where its caller is cancelled."""

    def __init__(self, pool: asyncpg.Pool, share_max: int) -> None:
        self._pool = pool
        self._shares = Shares(share_max)
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._asked = 0  # statements whose callers wait
        self._is_quiet = asyncio.Event()

    async def run(
        self,
        sql: str,
        arguments: Sequence[Any],
        seconds: float,
        on_sent: Callable[[], object] = _nothing,
        user_id: str | None = None,
    ) -> list[asyncpg.Record]:
        self._asked += 1
        self._is_quiet.clear()
        try:
            return await self._run(sql, arguments, self._loop.time() + seconds, on_sent, user_id)
        finally:
            self._asked -= 1
            if not self._asked:
                self._is_quiet.set()

    async def _run(
        self,
        sql: str,
        arguments: Sequence[Any],
        deadline: float,
        on_sent: Callable[[], object],
        user_id: str | None,
    ) -> list[asyncpg.Record]:
        if user_id is not None and not self._shares.take_now(user_id):
            try:
                async with asyncio.timeout_at(deadline):
                    await self._shares.wait(user_id)
            except TimeoutError:
                raise TimeoutError("other statements of this user are in its way") from None
        # Only this future is cancelled with the caller: asyncpg would end a statement that is cancelled, and with it
        # the connection. A future costs less than asyncio.shield.
        answered: asyncio.Future[list[asyncpg.Record]] = self._loop.create_future()
        task = self._loop.create_task(self._answer(answered, sql, arguments, deadline, on_sent, user_id))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            return await answered
        finally:
            del answered  # this frame is in the traceback of its error: a cycle that the garbage collector would free

    async def _answer(
        self,
        answered: asyncio.Future[list[asyncpg.Record]],
        sql: str,
        arguments: Sequence[Any],
        deadline: float,
        on_sent: Callable[[], object],
        user_id: str | None,
    ) -> None:
        try:
            async with asyncio.timeout_at(deadline):
                connection = await self._pool.acquire()
                try:
                    if answered.done():
                        return  # nobody waits for it any more, and it has not been sent
                    on_sent()
                    rows = await _fetch(connection, sql, arguments)
                finally:
                    await self._pool.release(connection)
            if not answered.done():
                answered.set_result(rows)
        except asyncio.CancelledError:  # the process ends
            answered.cancel()
            raise
        except BaseException as error:  # noqa: BLE001  (it is the caller's)
            if not answered.done():
                answered.set_exception(error)
        finally:
            del answered  # as in `_run`
            if user_id is not None:
                self._shares.give(user_id)

    async def close(self) -> None:
        # The pool waits for connections that are in use. These statements may not have theirs yet.
        if self._asked:
            await self._is_quiet.wait()
        await self._pool.close()

    def terminate(self) -> None:
        self._pool.terminate()


class _SingleLine:
    """One statement at a time, on a connection that is opened when it is needed; cheaper than a pool's."""

    def __init__(self, source: _Source) -> None:
        self._source = source
        self._connection: asyncpg.Connection | None = None
        self._lock = asyncio.Lock()

    async def run(
        self,
        sql: str,
        arguments: Sequence[Any],
        seconds: float,
        on_sent: Callable[[], object] = _nothing,
        user_id: str | None = None,
    ) -> list[asyncpg.Record]:
        async with asyncio.timeout(seconds), self._lock:
            if self._connection is None or self._connection.is_closed():
                self._connection = await self._source.connect()
            on_sent()
            return await _fetch(self._connection, sql, arguments)

    async def close(self) -> None:
        if self._connection is not None:
            await self._connection.close()

    def terminate(self) -> None:
        if self._connection is not None:
            self._connection.terminate()


def _unavailable(error: BaseException) -> Unavailable:
    return Unavailable(f"{type(error).__name__}: {describe(error)}".rstrip(": "))


async def _fetch(connection: Any, sql: str, arguments: Sequence[Any]) -> list[asyncpg.Record]:
    try:
        rows: list[asyncpg.Record] = await connection.fetch(sql, *arguments)
    except BaseException as error:
        # asyncpg would wait for the server to confirm a cancelled statement; a server that does not answer would
        # then hold the connection for ever. An error that the server itself reported is harmless, unless the server,
        # or a pooler in its place, closes the connection after it.
        if not isinstance(error, asyncpg.PostgresError) or isinstance(error, _LAST_WORDS):
            connection.terminate()
        raise
    return rows


async def _keep(connection: asyncpg.Connection) -> None:
    """Do nothing: no statement leaves session state behind, so a connection needs no reset between two uses."""
