"""Uvicorn, made to drain before it closes sockets, and its WebSocket transport, made to bound what a peer can do."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import sys
from types import FrameType
from typing import Final

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame
from websockets.http11 import Request

from anynode.server.api.ai_sdk.wire import REQUEST_BYTES_MAX
from anynode.server.api.operations import AI_SDK_PATH
from anynode.server.app import Anynode, open_anynode
from anynode.server.dev.orders import Orders
from anynode.server.errors import CloseCode
from anynode.server.settings import Settings
from anynode.server.transport.http import BREAK_OFF

logger = logging.getLogger("anynode")

FRAGMENTS_MAX: Final = 1024  # pieces of one message; smaller ones would cost far more memory than their bytes
WRITE_BUFFER_MAX: Final = 1_048_576  # bytes; past it a peer that pings but never reads is dropped
KEEPALIVE_SECONDS: Final = 20.0
HTTP_IDLE_SECONDS: Final = 75  # longer than load balancers keep a connection, who else send requests into a closed one
HEAD_SECONDS_MAX: Final = 10.0  # for the head of a request to come …
HEAD_BYTES_MAX: Final = 65_536  # … and how long it may be
UNSENT_SECONDS_MAX: Final = 60  # how long a peer that reads nothing of a response holds its connection
LINGERING_SECONDS: Final = 1.0  # how long a peer may take to read why its connection fails …
LINGERING_BYTES_MAX: Final = 16_777_216  # … and what it may send in the meantime
LETTING_GO_SECONDS: Final = 2.0  # how long what is cancelled at the very end may take
CLOSING_SECONDS: Final = 3  # how long closing handshakes may take at the end


class BoundedWebSocket(WebSocketsSansIOProtocol):
    """Uvicorn's transport, less what lets a peer grow memory or hold a dead socket."""

    lingered_bytes = 0

    def handle_connect(self, event: Request) -> None:
        """Begin; clients of the AI SDK post all messages of a chat at once."""
        if event.path.partition("?")[0] == AI_SDK_PATH:
            self.conn.max_message_size = REQUEST_BYTES_MAX
        super().handle_connect(event)

    def data_received(self, data: bytes) -> None:
        """Parse, unless the connection has failed already."""
        if self.conn.close_sent is not None and self.conn.close_rcvd is None and self.lingered_bytes:
            self.lingered_bytes += len(data)
            if self.lingered_bytes > LINGERING_BYTES_MAX:
                self.transport.abort()
            return
        super().data_received(data)

    def handle_parser_exception(self) -> None:
        """Say why the connection fails, and give the peer a moment to read it: a socket that is closed with input
        unread is reset, and the close code would be lost with it."""
        assert self.conn.close_sent is not None
        self.queue.put_nowait({"type": "websocket.disconnect", "code": self.conn.close_sent.code})
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        self.lingered_bytes = 1
        self.close_timer = self.loop.call_later(LINGERING_SECONDS, self.transport.close)
        self.transport.resume_reading()

    def handle_cont(self, event: Frame) -> None:
        """Refuse messages in too many pieces."""
        if self.lingered_bytes:
            return
        if len(self.frames) >= FRAGMENTS_MAX:
            self.conn.fail(CloseCode.LIMITS, "too many fragments")
            self.handle_parser_exception()
            return
        super().handle_cont(event)

    def handle_ping(self) -> None:
        """Answer, unless the peer does not read the answers."""
        if self.transport.get_write_buffer_size() > WRITE_BUFFER_MAX:
            self.transport.abort()
            return
        super().handle_ping()

    def keepalive_timeout(self) -> None:
        """Drop the socket: closing it would wait for a peer that does not read."""
        super().keepalive_timeout()
        self.transport.abort()


class BoundedHttp(HttpToolsProtocol):
    """Uvicorn's transport, less what lets a peer send the head of a request for ever."""

    _head_timer: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request as for the next one: browsers and balancers connect in advance."""
        super().connection_made(transport)
        self._await_head(HTTP_IDLE_SECONDS)

    def on_message_begin(self) -> None:
        """A request begins."""
        self._head_timer.cancel()
        self._await_head(HEAD_SECONDS_MAX)
        super().on_message_begin()
        self.scope[BREAK_OFF] = self.transport.close  # type: ignore[typeddict-unknown-key]

    def on_headers_complete(self) -> None:
        """Its head is whole."""
        self._head_timer.cancel()
        self._is_in_head = False
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Parse, unless the head has become too long."""
        super().data_received(data)
        if self._is_in_head:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES_MAX:
                self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more will come."""
        self._head_timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Where it is answered already, the rest of a request is not waited for."""
        if self.cycle.more_body and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(LINGERING_SECONDS, self.transport.close)
        super().on_response_complete()

    def _await_head(self, seconds: float) -> None:
        self._is_in_head = True
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(seconds, self.transport.abort)


class Server(uvicorn.Server):
    """Uvicorn's server, with a drain before its shutdown; a second signal cuts the drain short."""

    anynode: Anynode

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Not uvicorn's: that raises the signal again at the end, and the exit status would not be 0."""
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True

    def exit_soon(self) -> None:
        """As at a signal."""
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen; what is accepted inherits the bound on what a peer may leave unread."""
        await super().startup(sockets)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # on Linux
            for server in self.servers:
                for listening in server.sockets:
                    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * UNSENT_SECONDS_MAX)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, then shut down."""
        logger.info("draining")
        draining = asyncio.create_task(self.anynode.drain())
        while not draining.done() and not self.force_exit:
            await asyncio.wait((draining,), timeout=0.1)
        if not draining.done():
            draining.cancel()
            await asyncio.wait((draining,))
            await self.anynode.node.drain(0.0)
        await super().shutdown(sockets)
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def listen(settings: Settings, *, stop_with_input: bool = False, orders: Orders | None = None) -> None:
    """Serve until a signal. `stop_with_input`: also stop when standard input ends, as it does when the parent dies;
    `orders`: pass on what the page orders. Raises ConfigurationError, or SystemExit when the node has failed."""
    _spare_garbage_collection()
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(settings, stop_with_input, orders))
        runner.run(_let_go())


async def _serve(settings: Settings, stop_with_input: bool, orders: Orders | None) -> None:
    async with open_anynode(settings, orders) as anynode:
        config = uvicorn.Config(
            anynode.app(),
            host=settings.host,
            port=settings.port,
            ws=BoundedWebSocket,
            http=BoundedHttp,
            ws_max_size=settings.frame_bytes_max,
            ws_per_message_deflate=False,
            ws_ping_interval=KEEPALIVE_SECONDS,
            ws_ping_timeout=KEEPALIVE_SECONDS,
            timeout_keep_alive=HTTP_IDLE_SECONDS,
            timeout_graceful_shutdown=CLOSING_SECONDS,
            access_log=False,
            log_config=None,
            lifespan="off",
            server_header=False,
        )
        server = Server(config)
        server.anynode = anynode
        if stop_with_input:
            asyncio.get_running_loop().add_reader(sys.stdin.fileno(), _stop, server)
        anynode.running.add_done_callback(lambda _: server.exit_soon())
        await server.serve()
        if anynode.running.done():
            anynode.running.result()
            sys.exit(1)


def _spare_garbage_collection() -> None:
    """Make the collector look at what lives long less often: at 1,000 turns it took 11 % of the node's time, in pauses
    of up to 0.18 s. Nearly all that a turn makes is freed by its reference count."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)


async def _let_go() -> None:
    """End what is left; an agent that does not stop when it is cancelled does not hold up the exit."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    if left:
        _, stuck = await asyncio.wait(left, timeout=LETTING_GO_SECONDS)
        if stuck:
            logger.error("%d tasks do not stop when they are cancelled", len(stuck))
            logging.shutdown()
            os._exit(0)


def _stop(server: Server) -> None:
    if not os.read(sys.stdin.fileno(), 4096):
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        server.exit_soon()


def _loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # not on this platform
        return None
    return uvloop.Loop
