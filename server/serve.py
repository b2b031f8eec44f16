"""Running a node: uvicorn, with the bounded connections of `transport`, and a drain before it closes sockets.

`Server` and the classes of the connections override methods of uvicorn that are not its public interface. So
pyproject.toml bounds the versions of uvicorn and websockets, and tests/system/test_uvicorn.py checks that each override
is still called.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import sys
from collections.abc import Mapping
from functools import partial
from types import FrameType
from typing import Final

import uvicorn

from anynode.server.agents.load import check_agent, check_tools
from anynode.server.api.ai_sdk.wire import REQUEST_BYTES_MAX
from anynode.server.api.operations import AI_SDK_PATH
from anynode.server.app import Anynode, ExtraRoutes, no_routes, open_anynode
from anynode.server.logs import configure_logging
from anynode.server.settings import Settings, check_for_production, read_settings
from anynode.server.transport.bounded_http import HTTP_IDLE_SECONDS, BoundedHttp
from anynode.server.transport.bounded_websocket import BoundedWebSocket, accept_long_lines
from anynode.server.transport.open_files import allow_open_files
from anynode.server.transport.peers import HTTP_CONNECTIONS_MAX, Peers

try:
    import uvloop
except ImportError:  # there is none for this platform
    uvloop = None  # type: ignore[assignment]

logger = logging.getLogger("anynode")

KEEPALIVE_SECONDS: Final = 20.0
UNSENT_SECONDS_MAX: Final = 60  # how long a peer that reads nothing of a response holds its connection
LETTING_GO_SECONDS: Final = 2.0  # how long what is cancelled at the very end may take
CLOSING_SECONDS: Final = 3  # how long closing handshakes may take at the end
OWN_DATABASE_CONNECTIONS: Final = 3  # of a node, beside DATABASE_POOL_MAX for requests


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
    accept_long_lines()
    async with open_anynode(settings, extra_routes) as anynode:
        connections_max = settings.connections_max + settings.unauthenticated_max + HTTP_CONNECTIONS_MAX
        files = settings.database_pool_max + OWN_DATABASE_CONNECTIONS
        peers = Peers(allow_open_files(connections_max, files))
        config = uvicorn.Config(
            anynode.app(),
            host=settings.host,
            port=settings.port,
            # AI SDK clients send all messages of a chat at once, so theirs may be longer.
            ws=partial(BoundedWebSocket, peers=peers, longer_messages={AI_SDK_PATH: REQUEST_BYTES_MAX}),  # type: ignore[arg-type]
            http=partial(BoundedHttp, peers=peers),  # type: ignore[arg-type]
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
            proxy_headers=False,  # TRUSTED_PROXIES says whose are believed
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
