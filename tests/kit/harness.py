"""What tests need of the outside: databases, nodes as real processes, tokens, and sockets to talk over."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
from websockets.asyncio.client import ClientConnection, connect

from anynode.server.auth import make_token

CODE = Path(__file__).parents[2]  # this checkout
SECRET = secrets.token_urlsafe(48)
# Most tests do with one user, in seconds, what takes a person a day.
NO_USER_LIMITS = {
    "TURNS_PER_USER_MAX": "0",
    "TURNS_PER_USER_PER_MINUTE": "0",
    "TOKENS_PER_USER_PER_DAY": "0",
    "CONNECTIONS_PER_USER_MAX": "0",
}
TERMINAL = frozenset({"turn.completed", "turn.cancelled", "turn.failed"})
Frame = dict[str, Any]


def token_for(user: str, *, ttl_seconds: float = 3600, secret: str = SECRET, email: str | None = None) -> str:
    """A token that the nodes of these tests trust."""
    return make_token(secret, user_id=user, audience="anynode", issuer="anynode", ttl_seconds=ttl_seconds, email=email)


def with_database(url: str, name: str) -> str:
    """The URL of another database of the same server."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"/{name}"))


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def python_of(code: Path) -> str:
    """The Python that runs a checkout: this one for this checkout, and that of its `.venv` for another."""
    return sys.executable if code == CODE else str(code / ".venv" / "bin" / "python")


class NodeProcess:
    """A node as its operator runs it: `anynode serve` in a process of its own."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self.log = log

    @property
    def http(self) -> str:
        """The node's base URL."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def ws(self) -> str:
        """The node's base URL for sockets."""
        return f"ws://127.0.0.1:{self.port}"

    def get(self, path: str, *, user: str | None = None) -> tuple[int, str]:
        """Status and body of a GET."""
        headers = {} if user is None else {"Authorization": f"Bearer {token_for(user)}"}
        request = urllib.request.Request(self.http + path, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metric(self, name: str) -> float:
        """One number of `/metrics`, named with its labels as there."""
        for line in self.get("/metrics")[1].splitlines():
            if line.startswith(name + " "):
                return float(line.split()[-1])
        return 0.0

    def wait_until(self, path: str = "/readyz", *, within_seconds: float = 30.0) -> None:
        """Wait until a GET succeeds."""
        deadline = time.monotonic() + within_seconds
        while True:
            try:
                if self.get(path)[0] == 200:
                    return
            except OSError:
                pass
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{path} does not succeed: {self.log.read_text()[-2000:]}")
            time.sleep(0.03)

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def pause(self) -> None:
        """SIGSTOP."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self.process.send_signal(signal.SIGCONT)

    def stop(self, *, within_seconds: float = 15.0) -> int:
        """SIGTERM; returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(within_seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise


@contextmanager
def running_node(
    database_url: str,
    directory: Path,
    environment: Mapping[str, str] | None = None,
    *,
    port: int | None = None,
    until: str = "/readyz",
    code: Path = CODE,
) -> Iterator[NodeProcess]:
    """A node that is ready, or whatever else `until` asks; stopped, or killed where it does not stop, at the end.

    `code` is the checkout that runs, this one by default; another one runs with the Python of its `.venv`.
    """
    port = port or free_port()
    log = directory / f"node-{port}-{uuid.uuid4().hex[:6]}.log"
    inherited = {name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH", "LANG") if name in os.environ}
    settings = {
        "HOST": "127.0.0.1",
        "PORT": str(port),
        "DATABASE_URL": database_url,
        "JWT_SECRET": SECRET,
        "ECHO_TOKENS_PER_SECOND": "0",
        "DRAIN_SECONDS": "1",
        "CONNECTIONS_MAX": "5000",  # for which the limit of open files is high enough on any machine
        **NO_USER_LIMITS,
        "PYTHONPATH": str(code),
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [python_of(code), "-m", "anynode.server.cli", "serve"],
            env={**inherited, **settings, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    node = NodeProcess(process, port, log)
    try:
        node.wait_until(until)
        yield node
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            node.stop()


class Socket:
    """A raw connection: frames as dicts, exactly as they come."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection

    async def send(self, frame: Mapping[str, Any] | str) -> None:
        """Send a frame, or text as it is."""
        await self.connection.send(frame if isinstance(frame, str) else json.dumps(frame))

    async def receive(self, *, within_seconds: float = 15.0) -> Frame:
        """The next frame that is not a heartbeat."""
        async with asyncio.timeout(within_seconds):
            while True:
                frame: Frame = json.loads(await self.connection.recv())
                if frame["type"] != "heartbeat":
                    return frame

    async def until(self, *types: str, within_seconds: float = 15.0) -> list[Frame]:
        """The frames up to the first of one of these types, that one included."""
        frames = []
        async with asyncio.timeout(within_seconds):
            while True:
                frames.append(await self.receive(within_seconds=within_seconds))
                if frames[-1]["type"] in types:
                    return frames

    async def ask(self, content: str, conversation_id: str | None = None, message_id: str | None = None) -> str:
        """Send a message; returns its message_id."""
        message_id = message_id or str(uuid.uuid4())
        frame = {"type": "message.send", "message_id": message_id, "content": content}
        await self.send(frame if conversation_id is None else {**frame, "conversation_id": conversation_id})
        return message_id

    async def answer(
        self, content: str, conversation_id: str | None = None, message_id: str | None = None
    ) -> list[Frame]:
        """Send a message and take its frames up to the turn's end."""
        await self.ask(content, conversation_id, message_id)
        return await self.until(*TERMINAL, "error")

    async def follow(self, conversation_id: str, after: int | None = None) -> None:
        """Ask for a conversation from a cursor, or for a snapshot first."""
        frame: Frame = {"type": "conversation.follow", "conversation_id": conversation_id}
        await self.send(frame if after is None else {**frame, "after": after})

    async def closed(self, *, within_seconds: float = 15.0) -> int:
        """Wait for the server to close; returns its code."""
        async with asyncio.timeout(within_seconds):
            await self.connection.wait_closed()
        assert self.connection.close_code is not None
        return self.connection.close_code

    def drop(self) -> None:
        """Vanish without a closing handshake."""
        self.connection.transport.abort()


@asynccontextmanager
async def socket_to(
    node: NodeProcess,
    user: str = "ada",
    *,
    token: str | None = None,
    subprotocols: Sequence[str] = ("anynode.v1",),
    headers: Mapping[str, str] | None = None,
    ready: bool = True,
) -> AsyncIterator[Socket]:
    """A socket authenticated by header, past its `ready` frame. `ready=False`: bare, with only the headers given."""
    all_headers = dict(headers or {})
    if ready:
        all_headers["Authorization"] = f"Bearer {token or token_for(user)}"
    connection = await connect(
        node.ws + "/ws",
        subprotocols=subprotocols or None,  # type: ignore[arg-type]
        additional_headers=all_headers,
        compression=None,
        max_size=None,
        proxy=None,
        close_timeout=2,
    )
    try:
        opened = Socket(connection)
        if ready:
            assert (await opened.receive())["type"] == "ready"
        yield opened
    finally:
        await connection.close()


def text_of(frames: Sequence[Frame]) -> str:
    """What a client shows of a turn after these frames."""
    text = ""
    for frame in frames:
        if frame["type"] == "turn.delta":
            text += frame["text"]
        elif frame["type"] == "turn.restarted":
            text = frame["text"]
        elif frame["type"] == "conversation.snapshot" and frame["turn"] is not None:
            text = frame["turn"]["text"]
    return text


async def sql(database_url: str, statement: str, *arguments: Any) -> list[asyncpg.Record]:
    """Run one statement behind the server's back."""
    connection = await asyncpg.connect(database_url)
    try:
        return await connection.fetch(statement, *arguments)
    finally:
        await connection.close()
