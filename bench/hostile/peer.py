"""What attackers are made of: one TCP connection to the node, over which any bytes can go."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any, Final, TypeAlias

import jwt

from bench.load import TEXT, LoadError, client_frame

Figures: TypeAlias = dict[str, float]
# An attack prepares, yields nothing yet, attacks, and yields its figures. What it still holds it closes at the end.
AttackRun: TypeAlias = AsyncGenerator[Figures, None]

# On Linux the attackers have an address of their own, so that limits of one address do not meet the bystander.
ADDRESS: Final = "127.0.0.2" if sys.platform == "linux" else None
SENDING_SECONDS_MAX: Final = 10.0
READ_BYTES: Final = 262_144


@dataclass(frozen=True)
class Target:
    """A node, and how much of everything an attack may do: `seconds` for what goes on, `scale` for what is counted."""

    port: int
    secret: str
    database_url: str
    seconds: float
    scale: float
    provider_port: int

    def count(self, number: int) -> int:
        """Return a number of things, fewer in a quick run."""
        return max(1, round(number * self.scale))

    def token(self, user: str, **claims: object) -> str:
        """Return a token of a user, with more claims."""
        now = int(time.time())
        known = {"sub": user, "aud": "anynode", "iss": "anynode", "iat": now, "exp": now + 3600}
        return jwt.encode({**known, **claims}, self.secret, algorithm="HS256")

    def encoded(self) -> str:
        """Return it as JSON, for another process."""
        return json.dumps(asdict(self))


class Peer:
    """One TCP connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.sent_bytes = 0
        self._discarding: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, target: Target, *, receive_buffer: int | None = None) -> Peer:
        """Connect. Raises OSError."""
        connection = socket.socket()
        connection.setblocking(False)
        try:
            if receive_buffer is not None:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            if ADDRESS is not None:
                connection.bind((ADDRESS, 0))
            async with asyncio.timeout(SENDING_SECONDS_MAX):
                await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", target.port))
        except BaseException:
            connection.close()
            raise
        return cls(*await asyncio.open_connection(sock=connection, limit=2**28))

    async def send(self, data: bytes) -> bool:
        """Send bytes; return whether the connection still lives and took them within 10 seconds."""
        if self.is_closed:
            return False
        try:
            self.writer.write(data)
            async with asyncio.timeout(SENDING_SECONDS_MAX):
                await self.writer.drain()
        except OSError:  # a timeout is an OSError too
            return False
        self.sent_bytes += len(data)
        return True

    async def send_frame(self, frame: Mapping[str, Any]) -> bool:
        """Send a JSON frame."""
        return await self.send(client_frame(TEXT, json.dumps(frame).encode()))

    async def head(self, within_seconds: float = 10.0) -> bytes:
        """Return the head of the response; nothing if it does not come in time, or the connection ends."""
        try:
            async with asyncio.timeout(within_seconds):
                return await self.reader.readuntil(b"\r\n\r\n")
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            return b""

    async def answer(self, within_seconds: float = 30.0) -> tuple[int, bytes]:
        """Return status and body of a response that has a Content-Length; status 0 if none came."""
        head = (await self.head(within_seconds)).decode("latin-1").lower()
        if not head:
            return 0, b""
        length = head.partition("content-length: ")[2].partition("\r\n")[0]
        try:
            async with asyncio.timeout(within_seconds):
                body = await self.reader.readexactly(int(length)) if length else b""
        except (OSError, asyncio.IncompleteReadError):
            return 0, b""
        return int(head[9:12]), body

    async def frames(self) -> AsyncIterator[Mapping[str, Any]]:
        """Yield the JSON frames that come, until the connection ends."""
        try:
            while True:
                first_byte, length = await self.reader.readexactly(2)
                if length >= 126:
                    length = int.from_bytes(await self.reader.readexactly(2 if length == 126 else 8), "big")
                payload = await self.reader.readexactly(length)
                if first_byte == TEXT:
                    yield json.loads(payload)
        except (OSError, asyncio.IncompleteReadError):
            return

    async def until(self, *types: str, within_seconds: float = 20.0) -> Mapping[str, Any] | None:
        """Return the next frame of one of these types; None if it does not come."""
        try:
            async with asyncio.timeout(within_seconds):
                async for frame in self.frames():
                    if frame["type"] in types:
                        return frame
        except TimeoutError:
            pass
        return None

    async def ended(self, within_seconds: float) -> bool:
        """Wait for the node to end the connection, whatever it sends until then."""
        try:
            async with asyncio.timeout(within_seconds):
                while await self.reader.read(READ_BYTES):
                    pass
        except TimeoutError:
            return False
        except OSError:
            pass
        return True

    def discard(self) -> None:
        """Read and throw away all that comes from now on."""
        self._discarding = asyncio.create_task(self._discard())

    async def _discard(self) -> None:
        try:
            while await self.reader.read(READ_BYTES):
                pass
        except OSError:
            pass

    @property
    def is_closed(self) -> bool:
        """Whether the node has ended the connection, as far as this side has read."""
        return self.reader.at_eof() or self.writer.is_closing()

    def drop(self) -> None:
        """Vanish."""
        if self._discarding is not None:
            self._discarding.cancel()
        self.writer.transport.abort()


def handshake(
    path: str = "/ws",
    *,
    token: str | None = None,
    protocols: Sequence[str] = ("anynode.v1",),
    lines: Sequence[str] = (),
    is_ended: bool = True,
) -> bytes:
    """Return the head of a WebSocket handshake, with more header lines."""
    head = [
        f"GET {path} HTTP/1.1",
        "Host: 127.0.0.1",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
        "Sec-WebSocket-Version: 13",
    ]
    if protocols:
        head.append(f"Sec-WebSocket-Protocol: {', '.join(protocols)}")
    if token is not None:
        head.append(f"Authorization: Bearer {token}")
    return ("\r\n".join((*head, *lines)) + ("\r\n\r\n" if is_ended else "\r\n")).encode()


def request(method: str, path: str, token: str | None = None, body: bytes | None = None, *lines: str) -> bytes:
    """Return a request over HTTP, whole."""
    head = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", *lines]
    if token is not None:
        head.append(f"Authorization: Bearer {token}")
    if body is not None:
        head += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return ("\r\n".join(head) + "\r\n\r\n").encode() + (body or b"")


async def websocket(target: Target, path: str = "/ws", *, user: str | None = None, **options: Any) -> Peer | None:
    """Open a WebSocket, authenticated where there is a user; None if the node refuses it."""
    try:
        peer = await Peer.open(target, **options)
    except OSError:
        return None
    token = None if user is None else target.token(user)
    protocols = ("anynode.v1",) if path == "/ws" else ()
    if not await peer.send(handshake(path, token=token, protocols=protocols)) or b" 101 " not in await peer.head():
        peer.drop()
        return None
    if user is not None and path == "/ws" and await peer.until("ready") is None:
        peer.drop()
        return None
    return peer


@asynccontextmanager
async def websockets(
    target: Target, count: int, path: str = "/ws", *, user: str | None = None
) -> AsyncIterator[list[Peer]]:
    """Open several WebSockets, as many of them as the node lets in, and drop them at the end."""
    peers: list[Peer] = []
    try:
        for start in range(0, count, 50):
            opening = (websocket(target, path, user=user) for _ in range(start, min(start + 50, count)))
            peers += [peer for peer in await asyncio.gather(*opening) if peer is not None]
        yield peers
    finally:
        for peer in peers:
            peer.drop()


async def ask(target: Target, *requests: bytes) -> list[tuple[int, bytes]]:
    """Send requests over one connection, one after another, and return their answers. Raises LoadError for none."""
    peer = await Peer.open(target)
    try:
        answers = []
        for one in requests:
            await peer.send(one)
            answers.append(await peer.answer(60))
            if answers[-1][0] == 0:
                raise LoadError(f"no answer to {one[:80]!r}")
        return answers
    finally:
        peer.drop()


async def again_and_again(
    target: Target, count: int, attack: Callable[[int], Awaitable[object]], *, pause_seconds: float = 0.02
) -> int:
    """Let `count` attackers attack, each again and again, for the target's time; return how often in all.

    An attack that meets a closed connection counts too, and the pause keeps a refused attacker from taking a core.
    """
    deadline = asyncio.get_running_loop().time() + target.seconds
    times = 0

    async def go_on(number: int) -> None:
        nonlocal times
        while asyncio.get_running_loop().time() < deadline:
            try:
                await attack(number)
            except OSError:
                pass
            times += 1
            await asyncio.sleep(pause_seconds)

    try:
        async with asyncio.timeout(target.seconds + 2 * SENDING_SECONDS_MAX), asyncio.TaskGroup() as group:
            for number in range(count):
                group.create_task(go_on(number))
    except TimeoutError:
        pass
    return times


def drop_all(peers: Iterable[Peer]) -> None:
    """Let peers vanish."""
    for peer in peers:
        peer.drop()


def words(count: int) -> str:
    """Return a question of this many words, to which the echo agent says as many tokens."""
    return "a " * count


def noise(count: int) -> str:
    """Return text of this length that does not compress well."""
    return "".join(random.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=count))
