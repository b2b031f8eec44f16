"""A proxy between a node and Postgres that a test can cut, silence, and stop at a named statement.

It reads as much of the protocol as it takes to know which statement of queries.sql is executed. It runs in a thread
of its own, because who starts a node does not give way to the test's event loop. No TLS.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections import Counter, deque
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, Literal, TypeAlias, TypeVar
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

from anynode.models.queries import statements

CHUNK_BYTES: Final = 65_536
ACCEPTING_TURNS: Final = 10  # of the loop, from when a connection is accepted until it is known

When: TypeAlias = Literal["before", "after"]
Result = TypeVar("Result")


class Hold:
    """One execution of a statement that is stopped: `before` it is forwarded to Postgres, or `after` its outcome has
    come back (what it wrote is committed) and before the node hears of it. Other connections go on meanwhile.
    When the node gives up, or dies, what is held is never forwarded."""

    def __init__(self, loop: asyncio.AbstractEventLoop, when: When, names: frozenset[str], nth: int) -> None:
        self.when = when
        self._names = names
        self._left = nth
        self._loop = loop
        self._reached = threading.Event()
        self._released = asyncio.Event()

    @property
    def is_reached(self) -> bool:
        """Whether the execution has been stopped."""
        return self._reached.is_set()

    async def reached(self, *, within_seconds: float = 30.0) -> None:
        """Wait until the execution is stopped."""
        assert await asyncio.to_thread(self._reached.wait, within_seconds), f"{set(self._names)} was never executed"

    def release(self) -> None:
        """Let it go on."""
        self._loop.call_soon_threadsafe(self._released.set)

    def counts(self, name: str) -> bool:
        """Whether this execution of a statement is the one."""
        self._left -= name in self._names
        return name in self._names and self._left == 0

    async def stop(self, node_has_gone: asyncio.Event) -> bool:
        """Wait for the release; False when the node has gone before it."""
        self._reached.set()
        waiting = [asyncio.create_task(event.wait()) for event in (self._released, node_has_gone)]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()
        return self._released.is_set()


class PostgresProxy:
    """`url` leads through it; made by `postgres_proxy`. Its methods are the test's to call."""

    def __init__(self, database_url: str, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._database_url = database_url
        self._names = {statement.sql: name for name, statement in statements().items()}
        self._holds: list[Hold] = []
        self._executed: Counter[str] = Counter()
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.flowing = asyncio.Event()
        # Bound but deaf: nobody else gets the port while the proxy does not listen, and who connects is refused.
        self._reservation = _bound_socket(0)
        self._port: int = self._reservation.getsockname()[1]

    @property
    def url(self) -> str:
        """The database's URL, through the proxy."""
        parts = urlsplit(self._database_url)
        login, at, _ = parts.netloc.rpartition("@")
        parameters = {name: value for name, value in parse_qsl(parts.query) if name not in ("host", "port")}
        netloc = f"{login}{at}127.0.0.1:{self._port}"
        return urlunsplit(parts._replace(netloc=netloc, query=urlencode({**parameters, "sslmode": "disable"})))

    def hold(self, when: When, *names: str, nth: int = 1) -> Hold:
        """Stop at the nth execution, from now on, of one of these statements."""
        unknown = set(names) - set(statements())
        assert not unknown, f"queries.sql has no {unknown}"
        hold = Hold(self._loop, when, frozenset(names), nth)
        self._holds.append(hold)
        return hold

    def executions(self, name: str) -> int:
        """How often nodes have executed a statement so far."""
        return self._executed[name]

    def cut(self) -> None:
        """Drop all connections, and refuse new ones."""
        self._run(self._cut())

    def black_hole(self) -> None:
        """Forward nothing, either way; connections stay, new ones hang. What is sent arrives after `heal`."""
        self._loop.call_soon_threadsafe(self.flowing.clear)

    def heal(self) -> None:
        """Forward everything again, and accept connections."""
        self._run(self._heal())

    def close(self) -> None:
        """Drop everything."""
        self._run(self._cut())
        self._reservation.close()

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    # In the proxy's own thread.

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to Postgres."""
        parts = urlsplit(self._database_url)
        parameters = dict(parse_qsl(parts.query))
        host = parameters.get("host") or unquote(parts.hostname or "")
        port = int(parameters.get("port") or parts.port or 5432)
        if host.startswith("/"):
            return await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
        return await asyncio.open_connection(host, port)

    def name_of(self, sql: bytes) -> str | None:
        """Which statement of queries.sql this is."""
        return self._names.get(sql.decode())

    def count(self, name: str) -> list[Hold]:
        """A node executes a statement. Returns what is to stop it."""
        self._executed[name] += 1
        found = [hold for hold in self._holds if hold.counts(name)]
        self._holds = [hold for hold in self._holds if hold not in found]
        return found

    async def _cut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        # A connection that was accepted a moment ago reaches `_accept` some turns of the loop later.
        for _ in range(ACCEPTING_TURNS):
            connections = list(self._connections)
            for task in connections:
                task.cancel()
            await asyncio.gather(*connections, return_exceptions=True)
            await asyncio.sleep(0)

    async def _heal(self) -> None:
        self.flowing.set()
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, sock=_bound_socket(self._port))

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(_Connection(self, reader, writer).run())
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)
        task.add_done_callback(lambda _: writer.transport.abort())  # also where it was cancelled before it began


class _Connection:
    """One connection of a node."""

    def __init__(self, proxy: PostgresProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._node = reader, writer
        self._node_has_gone = asyncio.Event()
        self._prepared: dict[bytes, str | None] = {}
        self._answers: deque[Hold | None] = deque()  # one for each ReadyForQuery that is to come
        self._is_synced = True  # no statement since the last Sync

    async def run(self) -> None:
        """Carry it to Postgres until either side ends it."""
        node_reader, node_writer = self._node
        writers = [node_writer]
        try:
            (length,) = struct.unpack("!i", head := await node_reader.readexactly(4))
            startup = head + await node_reader.readexactly(length - 4)  # the one message without a kind
            await self._proxy.flowing.wait()
            reader, writer = await self._proxy.connect()
            writers.append(writer)
            writer.write(startup)
            await self._carry(node_reader, writer, reader, node_writer)
        except (OSError, EOFError):
            pass  # that is how connections end
        except asyncio.CancelledError:
            for writer in writers:
                writer.transport.abort()
            raise
        finally:
            for writer in writers:
                writer.close()
            for writer in writers:
                with suppress(OSError):
                    await writer.wait_closed()

    async def _carry(
        self,
        node_reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        reader: asyncio.StreamReader,
        node_writer: asyncio.StreamWriter,
    ) -> None:
        # What a side sends is read at once, so that its end is noticed also while something is held.
        said: asyncio.Queue[bytes] = asyncio.Queue()
        answered: asyncio.Queue[bytes] = asyncio.Queue()
        forwarding = {
            asyncio.create_task(self._forward_to_postgres(said, writer)),
            asyncio.create_task(self._forward_to_node(answered, node_writer)),
        }
        reading = {
            asyncio.create_task(_read(node_reader, said, self._node_has_gone)),
            asyncio.create_task(_read(reader, answered, asyncio.Event())),
        }
        try:
            done, _ = await asyncio.wait(forwarding, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in forwarding | reading:
                task.cancel()
            await asyncio.gather(*forwarding, *reading, return_exceptions=True)

    async def _forward_to_postgres(self, said: asyncio.Queue[bytes], writer: asyncio.StreamWriter) -> None:
        messages = _Messages()
        while chunk := await said.get():
            for message in messages.feed(chunk):
                for hold in self._read_message(message):
                    if not await hold.stop(self._node_has_gone):
                        return
                await self._proxy.flowing.wait()
                writer.write(message)
            await writer.drain()
        await self._proxy.flowing.wait()

    def _read_message(self, message: bytes) -> list[Hold]:
        """Note what it does. Returns what stops it before Postgres gets it."""
        kind, body = message[:1], message[5:]
        name = None
        match kind:
            case b"P":
                statement, sql, _ = body.split(b"\0", 2)
                self._prepared[statement] = self._proxy.name_of(sql)
                return []
            case b"B":
                _, statement, _ = body.split(b"\0", 2)
                name = self._prepared.get(statement)
            case b"Q":
                name = self._proxy.name_of(body[:-1])
            case b"S" if self._is_synced:
                self._answers.append(None)
                return []
            case b"S":
                self._is_synced = True
                return []
            case _:
                return []
        holds = [] if name is None else self._proxy.count(name)
        if self._is_synced:
            self._answers.append(None)
        self._answers[-1] = next((hold for hold in holds if hold.when == "after"), self._answers[-1])
        self._is_synced = kind == b"Q"  # Postgres itself ends a simple query
        return [hold for hold in holds if hold.when == "before"]

    async def _forward_to_node(self, answered: asyncio.Queue[bytes], writer: asyncio.StreamWriter) -> None:
        messages = _Messages()
        held = bytearray()
        while chunk := await answered.get():
            for message in messages.feed(chunk):
                held += message
                hold = self._answers[0] if self._answers else None
                # Only ReadyForQuery says that it is committed: CommandComplete comes before the commit.
                is_ready = message[:1] == b"Z"
                if is_ready and self._answers:
                    self._answers.popleft()
                if hold is not None and not is_ready:
                    continue
                if hold is not None and not await hold.stop(self._node_has_gone):
                    return
                await self._proxy.flowing.wait()
                writer.write(held)
                held.clear()
            await writer.drain()
        await self._proxy.flowing.wait()
        writer.write(held)


class _Messages:
    """Cuts a stream into messages: a byte that says the kind, the length of the rest in four."""

    def __init__(self) -> None:
        self._rest = bytearray()  # a message may have megabytes, and comes in pieces

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """The messages that are complete by now."""
        self._rest += chunk
        while len(self._rest) >= 5:
            end = 1 + struct.unpack_from("!i", self._rest, 1)[0]
            if len(self._rest) < end:
                return
            message = bytes(self._rest[:end])
            del self._rest[:end]
            yield message


async def _read(reader: asyncio.StreamReader, chunks: asyncio.Queue[bytes], has_ended: asyncio.Event) -> None:
    with suppress(OSError):
        while chunk := await reader.read(CHUNK_BYTES):
            chunks.put_nowait(chunk)
    chunks.put_nowait(b"")
    has_ended.set()


def _bound_socket(port: int) -> socket.socket:
    # With the protocol named, asyncio sets TCP_NODELAY; else small writes would wait for each other, 40 ms a time.
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    bound.bind(("127.0.0.1", port))
    return bound


@contextmanager
def postgres_proxy(database_url: str) -> Iterator[PostgresProxy]:
    """A proxy to this database, listening on a port of 127.0.0.1."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="postgres-proxy")
    thread.start()
    try:
        proxy = PostgresProxy(database_url, loop)
        try:
            proxy.heal()
            yield proxy
        finally:
            proxy.close()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
