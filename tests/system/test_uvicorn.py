"""What `serve` overrides of uvicorn, and reads of it and of websockets, is still there and still used.

These are no public interfaces. A new version that renames one of them would leave our override behind as dead code.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from functools import partial
from types import SimpleNamespace
from typing import Any, Final

import pytest
import uvicorn
from uvicorn.server import ServerState
from websockets.asyncio.client import ClientConnection, connect

from anynode.server.serve import Server
from anynode.server.transport.bounded_http import BoundedHttp
from anynode.server.transport.bounded_websocket import BoundedWebSocket
from anynode.server.transport.peers import Peers
from tests.kit.listening import handshake

CLASSES: Final = (BoundedWebSocket, BoundedHttp, Server)
# The names that our classes add. One that is meant to override, and whose name uvicorn has changed, is not among them.
ADDED: Final = {
    BoundedWebSocket: {
        *("is_lingering", "lingered_bytes", "cut_off", "_peers", "_longer_messages", "_message_bytes_max"),
        *("_is_authenticated", "_is_awaited", "_headers", "_budget", "_input", "_offset", "_wait", "_part_bytes"),
        *("_held_bytes", "_message_began", "_message_timer", "_refuse_handshake", "_lift_first_bounds", "_read_on"),
        *("_is_held_up", "_go_on", "_pause_or_resume", "_count_part", "_check_message", "_hold", "_drop_input"),
        *("_fail", "_linger", "_wait_writable"),
    },
    BoundedHttp: {
        *("cut_off", "_peers", "_head_timer", "_is_in_head", "_is_upgraded", "_loose_bytes", "_is_idle", "_drop"),
        "on_chunk_header",  # which the parser calls where there is one
    },
    Server: {"anynode", "exit_soon"},
}
KEEPALIVE_SECONDS: Final = 0.2
PATIENCE_SECONDS: Final = 10.0


def base_of(ours: type) -> type:
    """The class of uvicorn that one of ours extends."""
    (base,) = ours.__bases__
    return base


def methods(ours: type) -> set[str]:
    """The methods that a class of ours defines."""
    return {name for name, value in vars(ours).items() if inspect.isfunction(value)}


def overridden(ours: type) -> set[str]:
    """The methods that a class of ours defines in place of uvicorn's."""
    return {name for name in methods(ours) if hasattr(base_of(ours), name)}


def attributes(ours: type) -> set[tuple[str, ...]]:
    """What a class of ours reads and sets of itself: `("conn", "close_sent")` for `self.conn.close_sent`."""
    found = set()
    for node in ast.walk(ast.parse(inspect.getsource(ours))):
        chain: list[str] = []
        inner: ast.expr | ast.AST = node
        while isinstance(inner, ast.Attribute):
            chain.insert(0, inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name) and inner.id == "self" and chain:
            found.add(tuple(chain))
    return found


def config(app: Callable[..., Any], **options: Any) -> uvicorn.Config:
    """A configuration of uvicorn as `serve` has it, as far as it matters here."""
    made = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_config=None, access_log=False, lifespan="off", loop="none", **options
    )
    made.load()
    return made


async def answer_at_once(scope: Any, receive: Any, send: Any) -> None:
    """Answer a request without reading its body; accept a WebSocket and read it to its end."""
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"OK"})
        return
    await receive()
    await send({"type": "websocket.accept"})
    while (await receive())["type"] != "websocket.disconnect":
        pass


class Transport(asyncio.Transport):
    """A transport that takes everything, over no network."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Drop the data."""

    def is_closing(self) -> bool:
        """Return that it is open."""
        return False

    def close(self) -> None:
        """Stay open."""

    abort = pause_reading = resume_reading = write_eof = close

    def can_write_eof(self) -> bool:
        """Return that one side may be closed."""
        return True

    def get_write_buffer_size(self) -> int:
        """Return that nothing waits."""
        return 0


@pytest.mark.parametrize("ours", CLASSES)
def test_each_method_overrides_one_of_uvicorns_or_is_known_to_be_added(ours: type) -> None:
    assert methods(ours) - overridden(ours) <= ADDED[ours]
    assert not {name for name in ADDED[ours] if hasattr(base_of(ours), name)}


@pytest.mark.parametrize("ours", CLASSES)
def test_an_override_takes_the_arguments_that_uvicorns_method_takes(ours: type) -> None:
    for name in overridden(ours):
        mine, theirs = (inspect.signature(getattr(each, name)).parameters for each in (ours, base_of(ours)))
        added = set(mine) - set(theirs)
        assert [each for each in mine if each not in added] == list(theirs), name
        assert all(mine[each].kind is inspect.Parameter.KEYWORD_ONLY for each in added), name
    assert overridden(ours)


@pytest.mark.parametrize("ours", CLASSES)
async def test_what_is_read_of_uvicorn_and_websockets_is_there(ours: type) -> None:
    async with running(uvicorn.Server(config(answer_at_once))) as server:
        instance: Any = server
        if ours is not Server:
            instance = base_of(ours)(config(answer_at_once), ServerState(), {}, asyncio.get_running_loop())
            instance.connection_made(Transport())
        if ours is BoundedHttp:
            instance.data_received(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        if ours is BoundedWebSocket:
            instance.data_received(handshake("/"))
        read = {chain for chain in attributes(ours) if chain[0] not in ADDED[ours]}
        assert read
        for chain in read:
            found = instance
            for name in chain:
                assert hasattr(found, name), ".".join(chain)
                if (found := getattr(found, name)) is None:
                    break  # there is a value only later


@asynccontextmanager
async def running(server: uvicorn.Server) -> AsyncIterator[uvicorn.Server]:
    """A server that listens, until the end of the context."""
    serving = asyncio.create_task(server.serve())
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not server.started:  # noqa: ASYNC110 (it has no event)
                await asyncio.sleep(0)
        yield server
    finally:
        server.should_exit = True
        await serving


def port_of(server: uvicorn.Server) -> int:
    """The port that a server listens on."""
    port: int = server.servers[0].sockets[0].getsockname()[1]
    return port


class Calls:
    """The overrides that uvicorn, and not our own code, has called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: set[tuple[type, str]] = set()
        self.changed = asyncio.Event()
        for ours in CLASSES:
            for name in overridden(ours):
                monkeypatch.setattr(ours, name, self._recorded(ours, name, vars(ours)[name]))

    def _recorded(self, ours: type, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*arguments: Any, **named: Any) -> Any:
            if not sys._getframe(1).f_globals["__name__"].startswith("anynode."):
                self.seen.add((ours, name))
                self.changed.set()
            return method(*arguments, **named)

        return recorded

    async def wait_for(self, ours: type, *names: str) -> None:
        """Wait until all of these methods have been called."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while missing := {(ours, name) for name in names} - self.seen:
                self.changed.clear()
                try:
                    await self.changed.wait()
                except asyncio.CancelledError:
                    pytest.fail(f"never called: {missing}")


@asynccontextmanager
async def socket(url: str, **options: Any) -> AsyncIterator[ClientConnection]:
    """A WebSocket that is aborted at the end."""
    connection = await connect(url, compression=None, proxy=None, **options)
    try:
        yield connection
    finally:
        connection.transport.abort()


async def test_uvicorn_calls_each_override(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    options = {"ws_ping_interval": KEEPALIVE_SECONDS, "ws_ping_timeout": KEEPALIVE_SECONDS}
    peers = Peers(100)
    ws, http = partial(BoundedWebSocket, peers=peers, longer_messages={}), partial(BoundedHttp, peers=peers)
    server = Server(config(answer_at_once, ws=ws, http=http, **options))

    async def drain(seconds: float = 0.0) -> None:
        pass

    server.anynode = SimpleNamespace(drain=drain, node=SimpleNamespace(drain=drain))  # type: ignore[assignment]
    async with running(server):
        await calls.wait_for(Server, "startup")
        port = port_of(server)

        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with closing(writer):
            writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            later = {"connection_lost", "on_body", "handle_websocket_upgrade"}
            await calls.wait_for(BoundedHttp, *overridden(BoundedHttp) - later)
            writer.write(b"12345")
            await calls.wait_for(BoundedHttp, "on_body")
        await calls.wait_for(BoundedHttp, "connection_lost")

        async with socket(f"ws://127.0.0.1:{port}/") as peer:
            await calls.wait_for(BoundedHttp, "handle_websocket_upgrade")
            await calls.wait_for(BoundedWebSocket, "handle_connect", "data_received", "send", "receive")
            await peer.send(["a message ", "in fragments"])
            await calls.wait_for(BoundedWebSocket, "handle_cont")
            await peer.ping()
            await calls.wait_for(BoundedWebSocket, "handle_ping")
            peer.transport.write(b"\xff\xff")  # reserved bits, an unknown opcode, no mask
            await calls.wait_for(BoundedWebSocket, "handle_parser_exception")
        async with socket(f"ws://127.0.0.1:{port}/") as peer:
            peer.transport.pause_reading()  # so that it answers no ping
            await calls.wait_for(BoundedWebSocket, "keepalive_timeout", "connection_lost")
        async with socket(f"ws://127.0.0.1:{port}/"):
            signal.raise_signal(signal.SIGTERM)
            await calls.wait_for(BoundedWebSocket, "shutdown")
            await calls.wait_for(Server, "handle_exit", "shutdown")
    assert calls.seen == {(ours, name) for ours in CLASSES for name in overridden(ours)}
