"""Uvicorn in the test's own process, with the connections of `serve`, and raw sockets to it."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final

import uvicorn

from anynode.server.transport.bounded_http import BoundedHttp
from anynode.server.transport.bounded_websocket import BoundedWebSocket, accept_long_lines
from anynode.server.transport.connection import AUTHENTICATED
from anynode.server.transport.peers import Peers

LONGER_PATH: Final = "/longer"
LONGER_MESSAGE_BYTES: Final = 4_194_304
MESSAGE_BYTES: Final = 409_600
PATIENCE_SECONDS: Final = 10.0
KEY: Final = base64.b64encode(b"0123456789abcdef").decode()
MASK: Final = b"\x01\x02\x03\x04"


def configuration(app: Callable[..., Any], peers: Peers, **options: Any) -> uvicorn.Config:
    """A configuration of uvicorn as `serve` has it."""
    accept_long_lines()
    made = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=0,
        log_config=None,
        access_log=False,
        lifespan="off",
        loop="none",
        interface="asgi3",
        ws_max_size=MESSAGE_BYTES,
        ws_per_message_deflate=False,
        ws=partial(BoundedWebSocket, peers=peers, longer_messages={LONGER_PATH: LONGER_MESSAGE_BYTES}),  # type: ignore[arg-type]
        http=partial(BoundedHttp, peers=peers),  # type: ignore[arg-type]
        **options,
    )
    made.load()
    return made


@asynccontextmanager
async def listening(
    app: Callable[..., Any], peers: Peers | None = None, **options: Any
) -> AsyncIterator[tuple[uvicorn.Server, int]]:
    """A server that listens, with its port, until the end of the context."""
    server = uvicorn.Server(configuration(app, peers or Peers(1000), **options))
    serving = asyncio.create_task(server.serve())
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not server.started:  # noqa: ASYNC110 (it has no event)
                await asyncio.sleep(0)
        yield server, server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await serving


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answer a request with `OK`. Accept a WebSocket, take its client for authenticated and send back what it sends."""
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"OK"})
        return
    await receive()
    await send({"type": "websocket.accept"})
    scope.pop(AUTHENTICATED)()
    while (message := await receive())["type"] != "websocket.disconnect":
        await send({**message, "type": "websocket.send"})


def handshake(path: str = "/ws", *headers: str) -> bytes:
    """The head of a WebSocket handshake, with more headers."""
    lines = [
        f"GET {path} HTTP/1.1",
        "Host: a",
        "Connection: Upgrade",
        "Upgrade: websocket",
        f"Sec-WebSocket-Key: {KEY}",
        "Sec-WebSocket-Version: 13",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def masked(payload: bytes, mask: bytes = MASK) -> bytes:
    """A payload under a mask, or with its mask taken off."""
    key = int.from_bytes((mask * (len(payload) // 4 + 1))[: len(payload)], "big")
    return (int.from_bytes(payload, "big") ^ key).to_bytes(len(payload), "big")


def frame(opcode: int, payload: bytes = b"", *, fin: bool = True, rsv: int = 0, mask: bytes | None = MASK) -> bytes:
    """A frame of a client."""
    length = len(payload)
    head = bytes([(0x80 if fin else 0) | rsv << 4 | opcode])
    masks = 0x80 if mask is not None else 0
    if length < 126:
        head += bytes([masks | length])
    elif length < 65_536:
        head += bytes([masks | 126]) + length.to_bytes(2, "big")
    else:
        head += bytes([masks | 127]) + length.to_bytes(8, "big")
    return head + (payload if mask is None else mask + masked(payload, mask))


class RawSocket:
    """A WebSocket of a client that does as a test says, with no library in between."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        """Send bytes; what the server does not take any more is lost."""
        try:
            self.writer.write(data)
            await self.writer.drain()
        except ConnectionError:
            pass

    async def receive(self) -> tuple[int, bytes] | None:
        """The next frame as opcode and payload, None at the end."""
        try:
            first, length = await self.reader.readexactly(2)
            if length > 125:
                length = int.from_bytes(await self.reader.readexactly(2 if length == 126 else 8), "big")
            return first & 0x0F, await self.reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    async def rest(self) -> list[tuple[int, bytes]]:
        """All frames to the end of the connection."""
        frames = []
        async with asyncio.timeout(PATIENCE_SECONDS):
            while (received := await self.receive()) is not None:
                frames.append(received)
        return frames

    async def closed(self) -> tuple[int, str]:
        """The code and reason with which the server closes, 1006 where it just drops the connection."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while (received := await self.receive()) is not None and received[0] != 8:
                pass
        if received is None:
            return 1006, ""
        payload = received[1]
        return (int.from_bytes(payload[:2], "big") if payload else 1005), payload[2:].decode()


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[RawSocket]:
    """A TCP connection, which is dropped at the end."""
    raw = RawSocket(*await asyncio.open_connection("127.0.0.1", port))
    try:
        yield raw
    finally:
        raw.writer.transport.abort()


@asynccontextmanager
async def raw_socket(port: int, path: str = "/ws", *headers: str) -> AsyncIterator[RawSocket]:
    """A WebSocket past its handshake."""
    async with connected(port) as raw:
        await raw.send(handshake(path, *headers))
        async with asyncio.timeout(PATIENCE_SECONDS):
            head = await raw.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101"), head
        yield raw
