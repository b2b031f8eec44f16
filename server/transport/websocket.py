"""The WebSocket connections of a node: which clients may connect, and all that are open."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable

from starlette.types import Receive, Scope, Send

from anynode.server import metrics
from anynode.server.engine.node import Node
from anynode.server.errors import CloseCode
from anynode.server.origins import is_own, pattern_of
from anynode.server.settings import Settings
from anynode.server.transport.connection import Connection


class Sockets:
    """All open connections of a node."""

    def __init__(self, settings: Settings, node: Node) -> None:
        self.settings = settings
        self.node = node
        self.connections: set[Connection] = set()
        self._allowed = re.compile(pattern_of(settings.allowed_origins))

    async def go_away(self, deadline: float, over_seconds: float) -> None:
        """Tell all clients to connect elsewhere, then close their connections, spread over `over_seconds`."""
        leaving = list(self.connections)
        for connection in leaving:
            connection.warn_of_drain(deadline)
        pause = over_seconds / max(len(leaving), 1)
        for connection in leaving:
            await asyncio.sleep(pause)
            connection.close_soon(CloseCode.RESTARTING, "restarting")

    def refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Return why a connection is refused, as a close code and a reason, None where it is welcome."""
        if not self._is_origin_allowed(scope):
            return CloseCode.FORBIDDEN, "pages of this origin may not connect (ALLOWED_ORIGINS)"
        if self.node.is_draining:
            return CloseCode.RESTARTING, "restarting"
        if len(self.connections) >= self.settings.connections_max:
            return CloseCode.OVERLOADED, "this node is at its limit of connections"
        return None

    def _is_origin_allowed(self, scope: Scope) -> bool:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"] if name in (b"origin", b"host")}
        origin = headers.get(b"origin")
        if origin is None:  # not a browser
            return True
        return is_own(origin, headers.get(b"host", "")) or self._allowed.fullmatch(origin) is not None


class WebSocketEndpoint:
    """The ASGI application behind one path; `connect(scope, receive, send, refusal=…)` makes its connections."""

    def __init__(self, sockets: Sockets, connect: Callable[..., Connection]) -> None:
        self._sockets = sockets
        self._connect = connect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection to its end."""
        connections = self._sockets.connections
        connection = self._connect(scope, receive, send, refusal=self._sockets.refusal(scope))
        connections.add(connection)
        metrics.connections.inc()
        try:
            await connection.run()
        finally:
            connections.discard(connection)
            metrics.connections.dec()
