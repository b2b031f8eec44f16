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
from anynode.server.transport.addresses import address_of
from anynode.server.transport.connection import Connection
from anynode.server.transport.shares import Shares


class Sockets:
    """All open connections of a node."""

    def __init__(self, settings: Settings, node: Node, shares: Shares) -> None:
        self.settings = settings
        self.node = node
        self.shares = shares
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
        if self.shares.sessions.is_full:  # so it would be refused once it has authenticated
            return CloseCode.OVERLOADED, "this node is at its limit of connections"
        return None

    def enter(self, connection: Connection, scope: Scope) -> None:
        """Count a connection that begins. Until it has authenticated, it may have to give way to newer ones."""
        self.connections.add(connection)
        metrics.connections.inc()
        headers = scope["headers"]
        forwarded_for = [value.decode("latin-1") for name, value in headers if name == b"x-forwarded-for"]
        peer = (scope.get("client") or ("",))[0]
        address = address_of(peer, forwarded_for, self.settings.trusted_proxies)
        if (reached := self.shares.unauthenticated.add(connection, address)) is not None:
            metrics.refused.labels(limit=reached).inc()

    def leave(self, connection: Connection) -> None:
        """Forget a connection that has ended."""
        self.shares.unauthenticated.discard(connection)
        self.connections.discard(connection)
        metrics.connections.dec()

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
        connection = self._connect(scope, receive, send, refusal=self._sockets.refusal(scope))
        self._sockets.enter(connection, scope)
        try:
            await connection.run()
        finally:
            self._sockets.leave(connection)
