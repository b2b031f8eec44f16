"""What a closed connection held is freed by its reference counts: the garbage collector is off in these tests."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, TypeAlias, cast

import pytest
import pytest_asyncio
from websockets.server import ServerProtocol

from anynode.server.auth import Authenticator, Identity
from anynode.server.errors import ClientError, InvalidFrame, Unauthorized
from anynode.server.settings import Settings
from anynode.server.transport.bounded_http import BoundedHttp
from anynode.server.transport.bounded_websocket import BoundedWebSocket
from anynode.server.transport.connection import Connection
from anynode.server.transport.shares import Shares
from tests.kit.listening import PATIENCE_SECONDS, RawSocket, connected, echo, frame, listening, raw_socket
from tests.kit.turns import node_with

End: TypeAlias = Callable[[RawSocket], Awaitable[None]]
LIVE: weakref.WeakSet[Any] = weakref.WeakSet()  # what has been made and is not freed


class Tokens:
    """Trusts one token."""

    async def authenticate(self, token: str) -> Identity:
        if token != "good":
            raise Unauthorized("the token is malformed")
        return Identity("user-1", 4e9)


class Api(Connection):
    """A connection of an API with everything that a connection has: tasks, timers, refusals."""

    __slots__ = ("__weakref__",)
    subprotocol = "test.v1"

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        LIVE.add(self)

    def _token_in(self, text: str) -> str:
        return text

    async def _welcome(self) -> None:
        self._start_heartbeats("heartbeat")
        self._spawn(self._wait())
        await self._send("welcome")

    async def _wait(self) -> None:
        await asyncio.Event().wait()

    async def _obey(self, text: str) -> None:
        raise InvalidFrame(text)

    async def _refuse(self, error: ClientError, text: str) -> None:
        await self._send(f"refused {text}")


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Serve a WebSocket as an API's connection, and a request as an echo."""
    if scope["type"] == "http":
        await echo(scope, receive, send)
        return
    tokens = cast(Authenticator, Tokens())
    await Api(Settings(), node_with(), tokens, Shares(Settings()), scope, receive, send, refusal=None).run()


@pytest_asyncio.fixture
async def port(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[int]:
    """The port of a server whose connections are noted while they live."""
    for kind in (BoundedHttp, BoundedWebSocket):
        made = kind.connection_made

        def note(self: Any, transport: Any, made: Any = made) -> None:
            LIVE.add(self)
            if isinstance(self, BoundedWebSocket):
                LIVE.add(self.conn)
            made(self, transport)

        monkeypatch.setattr(kind, "connection_made", note)
    async with listening(app) as (_, port):
        yield port


@pytest.fixture
def uncollected() -> Iterator[None]:
    """No garbage collector."""
    gc.collect()
    LIVE.clear()
    gc.disable()
    yield
    gc.enable()


async def freed() -> None:
    """Wait until nothing that was noted is left."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while LIVE:  # noqa: ASYNC110 (nothing tells of it)
            await asyncio.sleep(0.01)


async def close(raw: RawSocket) -> None:
    """Close as one should."""
    await raw.send(frame(8, b"\x03\xe8"))
    await raw.rest()


async def drop(raw: RawSocket) -> None:
    """Vanish."""
    raw.writer.transport.abort()


async def be_refused(raw: RawSocket) -> None:
    """Send what is refused, then vanish."""
    await raw.send(frame(1, b"what?"))
    while (received := await raw.receive()) is not None and received[1] != b"refused what?":
        pass


async def fail(raw: RawSocket) -> None:
    """Send what no client may."""
    await raw.send(frame(1, b"x", rsv=1))
    await raw.rest()


async def leave_unfinished(raw: RawSocket) -> None:
    """Send a part of a message, then vanish."""
    await raw.send(frame(1, b"x" * 300_000)[:200_000])


@pytest.mark.parametrize("end", [close, drop, be_refused, fail, leave_unfinished])
async def test_a_websocket_is_freed(port: int, uncollected: None, end: End) -> None:
    async with raw_socket(port) as raw:
        await raw.send(frame(1, b"good"))
        assert await raw.receive() == (1, b"welcome")
        assert {type(each) for each in LIVE} == {BoundedWebSocket, ServerProtocol, Api}
        await end(raw)
    await freed()


@pytest.mark.parametrize("end", [close, drop])
async def test_a_websocket_that_never_authenticated_is_freed(port: int, uncollected: None, end: End) -> None:
    async with raw_socket(port) as raw:
        await end(raw)
    await freed()


async def test_a_refused_websocket_is_freed(port: int, uncollected: None) -> None:
    async with raw_socket(port) as raw:
        await raw.send(frame(1, b"bad"))
        assert (await raw.closed())[0] == 3000
        await close(raw)
    await freed()


async def test_a_connection_of_requests_is_freed(port: int, uncollected: None) -> None:
    async with connected(port) as raw:
        for _ in range(2):
            await raw.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}")
            assert (await raw.reader.readuntil(b"\r\n\r\nOK")).startswith(b"HTTP/1.1 200")
        assert {type(each) for each in LIVE} == {BoundedHttp}
    await freed()
