"""Uvicorn, which here drains before it closes sockets, and bounds what a peer can do over HTTP and WebSockets.

The classes override methods of uvicorn that are not its public interface. So pyproject.toml bounds the versions of
uvicorn and websockets, and tests/system/test_uvicorn.py checks that each override is still called.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Final

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame
from websockets.http11 import Request

from anynode.server.agents.load import check_agent, check_tools
from anynode.server.api.ai_sdk.wire import REQUEST_BYTES_MAX
from anynode.server.api.operations import AI_SDK_PATH
from anynode.server.app import Anynode, ExtraRoutes, no_routes, open_anynode
from anynode.server.errors import CloseCode
from anynode.server.logs import configure_logging
from anynode.server.settings import Settings, check_for_production, read_settings
from anynode.server.transport.http import BREAK_OFF

try:
    import uvloop
except ImportError:  # there is none for this platform
    uvloop = None  # type: ignore[assignment]

logger = logging.getLogger("anynode")

FRAGMENTS_MAX: Final = 1024  # pieces of one message; smaller ones would cost far more memory than their bytes
WRITE_BUFFER_MAX: Final = 1_048_576  # bytes; past it a peer that pings but never reads is dropped
KEEPALIVE_SECONDS: Final = 20.0
HTTP_IDLE_SECONDS: Final = 75  # longer than load balancers keep a connection, or they would send into a closed one
HEAD_SECONDS_MAX: Final = 10.0  # for the head of a request to come …
HEAD_BYTES_MAX: Final = 65_536  # … and how long it may be
UNSENT_SECONDS_MAX: Final = 60  # how long a peer that reads nothing of a response holds its connection
LINGERING_SECONDS: Final = 1.0  # how long a peer may take to read why its connection fails …
LINGERING_BYTES_MAX: Final = 16_777_216  # … and what it may send in the meantime
LETTING_GO_SECONDS: Final = 2.0  # how long what is cancelled at the very end may take
CLOSING_SECONDS: Final = 3  # how long closing handshakes may take at the end


class BoundedWebSocket(WebSocketsSansIOProtocol):
    """Uvicorn's WebSocket connection, with bounds on a peer's use of memory and on the life of a dead connection."""

    is_lingering = False  # the connection has failed, and the peer is given a moment to read why
    lingered_bytes = 0  # what it has sent since

    def handle_connect(self, event: Request) -> None:
        """Begin the connection. AI SDK clients send all messages of a chat at once, so theirs may be longer."""
        if event.path.partition("?")[0] == AI_SDK_PATH:
            self.conn.max_message_size = REQUEST_BYTES_MAX
        super().handle_connect(event)

    def data_received(self, data: bytes) -> None:
        """Parse what was received, or discard it when the connection has failed already."""
        if self.conn.close_sent is not None and self.conn.close_rcvd is None and self.is_lingering:
            self.lingered_bytes += len(data)
            if self.lingered_bytes > LINGERING_BYTES_MAX:
                self.transport.abort()
            return
        super().data_received(data)

    def handle_parser_exception(self) -> None:
        """Tell the peer why the connection fails, and give it a moment to read that. A socket that is closed with input
        unread is reset, and the close code would be lost."""
        assert self.conn.close_sent is not None
        self.queue.put_nowait({"type": "websocket.disconnect", "code": self.conn.close_sent.code})
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        self.is_lingering = True
        self.close_timer = self.loop.call_later(LINGERING_SECONDS, self.transport.close)
        self.transport.resume_reading()

    def handle_cont(self, event: Frame) -> None:
        """Take a fragment of a message; fail the connection when the message has too many of them."""
        if self.is_lingering:
            return
        if len(self.frames) >= FRAGMENTS_MAX:
            self.conn.fail(CloseCode.LIMITS, "too many fragments")
            self.handle_parser_exception()
            return
        super().handle_cont(event)

    def handle_ping(self) -> None:
        """Answer a ping; drop a peer that does not read the answers."""
        if self.transport.get_write_buffer_size() > WRITE_BUFFER_MAX:
            self.transport.abort()
            return
        super().handle_ping()

    def keepalive_timeout(self) -> None:
        """Drop the socket of a peer that answers no ping: closing it would wait for the peer to read."""
        super().keepalive_timeout()
        self.transport.abort()


class BoundedHttp(HttpToolsProtocol):
    """Uvicorn's HTTP connection, with bounds on the time and size of a request's head."""

    _head_timer: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request as long as for a later one: browsers and load balancers connect in advance."""
        super().connection_made(transport)
        self._await_head(HTTP_IDLE_SECONDS)

    def on_message_begin(self) -> None:
        """Start the time for the head of a request, and put the means to break it off into its scope."""
        self._head_timer.cancel()
        self._await_head(HEAD_SECONDS_MAX)
        super().on_message_begin()
        self.scope[BREAK_OFF] = self.transport.close  # type: ignore[typeddict-unknown-key]

    def on_headers_complete(self) -> None:
        """Stop the time for the head of a request, as the head is complete."""
        self._head_timer.cancel()
        self._is_in_head = False
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Parse what was received; drop the connection when the head of a request is too long."""
        super().data_received(data)
        if self._is_in_head:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES_MAX:
                self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the time for the head of a request, as the connection is lost."""
        self._head_timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Close the connection soon if a request was answered before its body came: the rest is not waited for."""
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
        """Take a signal. Unlike uvicorn, do not raise it again at the end: the exit status would not be 0."""
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True

    def exit_soon(self) -> None:
        """Stop the server as a signal does."""
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen. Accepted connections inherit the bound on how long a peer may leave what it is sent unread."""
        await super().startup(sockets)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # on Linux
            for server in self.servers:
                for listening in server.sockets:
                    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * UNSENT_SECONDS_MAX)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain the node, then shut the server down."""
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


def run_node(
    environment: Mapping[str, str],
    *,
    log_level: int = logging.INFO,
    stop_with_input: bool = False,
    extra_routes: ExtraRoutes = no_routes,
) -> None:
    """Run one node, as the environment configures it, until a signal. `stop_with_input` and `extra_routes`: see
    `listen`. Raises ConfigurationError, or SystemExit when the node has failed."""
    configure_logging(log_level)
    settings = read_settings(environment)
    check_for_production(settings)
    check_agent(settings.agent)
    check_tools(settings.tools)
    listen(settings, stop_with_input=stop_with_input, extra_routes=extra_routes)


def listen(settings: Settings, *, stop_with_input: bool = False, extra_routes: ExtraRoutes = no_routes) -> None:
    """Serve until a signal. `stop_with_input`: also stop when standard input ends, as it does when the parent process
    dies. `extra_routes`: serve these routes too. Raises ConfigurationError, or SystemExit when the node has failed."""
    _spare_garbage_collection()
    with asyncio.Runner(loop_factory=None if uvloop is None else uvloop.Loop) as runner:
        runner.run(_serve(settings, stop_with_input, extra_routes))
        runner.run(_let_go())


async def _serve(settings: Settings, stop_with_input: bool, extra_routes: ExtraRoutes) -> None:
    async with open_anynode(settings, extra_routes) as anynode:
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
            headers=[("X-Content-Type-Options", "nosniff")],  # on every answer, also on those of uvicorn itself
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
    """Make the garbage collector visit long-lived objects less often.

    At 1,000 turns it took 11 % of the node's time, in pauses of up to 0.18 s. Nearly all objects of a turn are freed by
    their reference counts.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)


async def _let_go() -> None:
    """Cancel the tasks that are left. An agent that does not stop then does not hold up the exit."""
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
