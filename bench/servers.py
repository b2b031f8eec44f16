"""The servers that are measured: Postgres with default durability, and product or floor on a fresh database."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID

import asyncpg
import psutil

from anynode.models.ids import uuid7
from anynode.models.migrate import migrate
from anynode.server.auth import make_token
from anynode.server.dev.embedded_postgres import EmbeddedPostgres
from bench import floor
from bench.load import LoadError

Side: TypeAlias = Literal["product", "floor"]
SIDES: Final[tuple[Side, Side]] = ("product", "floor")

ROOT: Final = Path(__file__).parent.parent
USER: Final = "bench"
# All conversations are one user's. The limits are counted as in production, and are never reached.
NOT_REACHED: Final = {
    "TURNS_PER_USER_MAX": "1000000",
    "TURNS_PER_USER_PER_MINUTE": "100000000",
    "TOKENS_PER_USER_PER_DAY": "100000000000",
    "CONNECTIONS_PER_USER_MAX": "1000000",
}
READY_SECONDS: Final = 30.0
STOP_SECONDS: Final = 8.0
CONTENT: Final = "a message of a hundred characters, which is about what people and models say to each other in chats"

COMMANDS: Final[Mapping[Side, Sequence[str]]] = {
    "product": ("-m", "bench.product"),
    "floor": ("-m", "bench.floor"),
}
SEEDS: Final[Mapping[Side, Sequence[str]]] = {
    "product": (
        f"INSERT INTO users (id) VALUES ('{USER}') ON CONFLICT DO NOTHING",
        f"INSERT INTO conversations (id, user_id) SELECT unnest($1::uuid[]), '{USER}'",
        f"""INSERT INTO messages (id, conversation_id, user_id, client_id, position, role, content, turn_id)
            SELECT gen_random_uuid(), c, '{USER}', CASE WHEN p % 2 = 1 THEN gen_random_uuid()::text END, p,
                   CASE WHEN p % 2 = 1 THEN 'user' ELSE 'assistant' END, '{CONTENT}',
                   md5(c::text || (p + 1) / 2)::uuid
            FROM unnest($1::uuid[]) c, generate_series(1, $2::integer) p ORDER BY c, p""",
        # The turns that they come from: with none, the planner has statistics of a database that was never used.
        f"""INSERT INTO turns (id, conversation_id, status, node, epoch, lease_expires_at, finished_at)
            SELECT md5(c::text || t)::uuid, c, 'completed', '{USER}', 1, now(), now()
            FROM unnest($1::uuid[]) c, generate_series(1, $2::integer / 2) t""",
    ),
    "floor": (
        f"""INSERT INTO messages (conversation_id, position, role, content)
            SELECT c, p, CASE WHEN p % 2 = 1 THEN 'user' ELSE 'assistant' END, '{CONTENT}'
            FROM unnest($1::uuid[]) c, generate_series(1, $2::integer) p ORDER BY c, p""",
    ),
}
# Without `events`: it is never empty while turns run, and a table that was empty when it was analysed gets plans that
# are good only for an empty table.
ANALYSED: Final[Mapping[Side, str]] = {"product": "users, conversations, messages, turns", "floor": "messages"}


@dataclass(frozen=True)
class Server:
    """A running server."""

    side: Side
    port: int
    process: psutil.Process
    database_url: str
    handle: asyncio.subprocess.Process

    def kill(self) -> None:
        """Send SIGKILL."""
        self.handle.kill()

    async def stop(self, within_seconds: float) -> int:
        """Send SIGTERM and return the exit status. Raises TimeoutError."""
        self.handle.terminate()
        async with asyncio.timeout(within_seconds):
            return await self.handle.wait()

    def cpu_seconds(self) -> float:
        """Return the CPU time of the process and its children so far, user and system."""
        return cpu_seconds(self.process)

    def private_bytes(self) -> int:
        """Return the memory that only the process and its children use (USS)."""
        processes = (self.process, *self.process.children(recursive=True))
        return sum(int(process.memory_full_info().uss) for process in processes)

    async def metric(self, name: str) -> float:
        """Return one number of a node's `/metrics`."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        answer = (await reader.read()).decode()
        writer.close()
        for line in answer.splitlines():
            if line.startswith(name + " "):
                return float(line.split()[1])
        raise LoadError(f"the node counts no {name}")


class Bench:
    """A Postgres, a seeded template for each side, and conversations by the length of their history."""

    def __init__(self, postgres: EmbeddedPostgres, directory: Path) -> None:
        self.conversations: dict[int, list[UUID]] = {}
        self.postgres = psutil.Process(postgres.pid)
        self._url = postgres.url
        self._log = directory / "server.log"
        self._secret = secrets.token_urlsafe(48)
        self.token = make_token(self._secret, user_id=USER, audience="anynode", issuer="anynode", ttl_seconds=86_400)

    async def prepare(self, conversations: Mapping[int, int], sides: Sequence[Side] = SIDES) -> None:
        """Make the templates; `conversations` says how many there are of each length."""
        self.conversations = {length: [uuid7() for _ in range(count)] for length, count in conversations.items()}
        for side in sides:
            await self._execute(f"CREATE DATABASE {side}_template")
            url = self.template_url(side)
            connection = await asyncpg.connect(url)
            try:
                if side == "product":
                    await migrate(url)
                else:
                    await connection.execute(floor.SCHEMA)
                for length, ids in self.conversations.items():
                    for statement in SEEDS[side]:
                        arguments = (ids, length)[: statement.count("$1") + statement.count("$2")]
                        await connection.execute(statement, *arguments)
                await connection.execute(f"VACUUM ANALYZE {ANALYSED[side]}")
            finally:
                await connection.close()

    def template_url(self, side: Side) -> str:
        """Return the URL of the seeded database of a side, to read; servers get copies of it."""
        return _with_database(self._url, f"{side}_template")

    @asynccontextmanager
    async def serve(self, side: Side, **environment: object) -> AsyncIterator[Server]:
        """Start a server in a process of its own, on a copy of its template; both sides take the product's settings."""
        async with self._database(side) as url, self._process(side, url, environment) as server:
            yield server

    @asynccontextmanager
    async def serve_nodes(self, count: int, **environment: object) -> AsyncIterator[list[Server]]:
        """Start several nodes of the product on one database."""
        async with self._database("product") as url, AsyncExitStack() as stack:
            yield [await stack.enter_async_context(self._process("product", url, environment)) for _ in range(count)]

    @asynccontextmanager
    async def _database(self, side: Side) -> AsyncIterator[str]:
        name = f"{side}_{secrets.token_hex(4)}"
        self._log.write_bytes(b"")
        await self._execute(f"CREATE DATABASE {name} TEMPLATE {side}_template STRATEGY file_copy")
        try:
            yield _with_database(self._url, name)
        finally:
            await self._execute(f"DROP DATABASE {name} WITH (FORCE)")

    @asynccontextmanager
    async def _process(self, side: Side, url: str, environment: Mapping[str, object]) -> AsyncIterator[Server]:
        port = _free_port()
        inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        settings = {
            "HOST": "127.0.0.1",
            "PORT": str(port),
            "DATABASE_URL": url,
            "JWT_SECRET": self._secret,
            "DRAIN_SECONDS": "0",
            **NOT_REACHED,
            "PYTHONPATH": str(ROOT),
            **{name: str(value) for name, value in environment.items()},
        }
        with self._log.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *COMMANDS[side],
                env=inherited | settings,
                cwd=ROOT,
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=log,
            )
        try:
            await self._wait_until_ready(process, port)
            yield Server(side, port, psutil.Process(process.pid), url, process)
        finally:
            await _stop(process)

    async def _wait_until_ready(self, process: asyncio.subprocess.Process, port: int) -> None:
        # Both listen only when their pools are open.
        deadline = time.monotonic() + READY_SECONDS
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                return
            except OSError:
                pass
            if process.returncode is not None or time.monotonic() > deadline:
                raise LoadError("the server does not start")
            await asyncio.sleep(0.03)

    def log(self) -> str:
        """Return the logs of the newest servers."""
        return self._log.read_text() if self._log.exists() else ""

    def postgres_cpu_seconds(self) -> float:
        """Return the CPU time of Postgres so far, with all of its processes, also those that have ended."""
        return cpu_seconds(self.postgres)

    async def wal_bytes(self) -> int:
        """Return the bytes of WAL that were written so far."""
        return await self._number("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint")

    async def commits(self, server: Server) -> int:
        """Return the transactions that were committed in the server's database so far. A backend reports its own once a
        second, and its last ones after 10 s of idleness."""
        name = urlsplit(server.database_url).path.strip("/")
        return await self._number("SELECT xact_commit FROM pg_stat_database WHERE datname = $1", name)

    async def _number(self, statement: str, *arguments: object) -> int:
        connection = await asyncpg.connect(self._url)
        try:
            number: int = await connection.fetchval(statement, *arguments)
        finally:
            await connection.close()
        return number

    async def _execute(self, statement: str) -> None:
        connection = await asyncpg.connect(self._url)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()


def cpu_seconds(process: psutil.Process) -> float:
    """Return the CPU time of a process, its children and those that it has outlived, so far."""
    total = 0.0
    for one in (process, *process.children(recursive=True)):
        try:
            times = one.cpu_times()
        except psutil.NoSuchProcess:
            continue  # it has just ended, and its parent counts its time
        total += times.user + times.system + times.children_user + times.children_system
    return total


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
    try:
        async with asyncio.timeout(STOP_SECONDS):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


def _with_database(url: str, name: str) -> str:
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
