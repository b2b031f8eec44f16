"""The socket at `/ws`: who may connect, and all connections of a node."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

from starlette.types import Receive, Scope, Send

from server import metrics
from server.auth import Authenticator
from server.connection import Connection
from server.encoding import encode
from server.errors import CloseCode
from server.node import Node
from server.protocol import Goaway
from server.settings import Settings


class WebSocketEndpoint:
    """The ASGI application behind `/ws`, and all of its open connections."""

    def __init__(self, settings: Settings, node: Node, authenticator: Authenticator) -> None:
        self.settings = settings
        self.node = node
        self.authenticator = authenticator
        self.connections: set[Connection] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection to its end."""
        refusal = self._refusal(scope)
        connection = Connection(self.settings, self.node, self.authenticator, scope, receive, send, refusal=refusal)
        self.connections.add(connection)
        metrics.connections.inc()
        try:
            await connection.run()
        finally:
            self.connections.discard(connection)
            metrics.connections.dec()

    async def go_away(self, deadline: float, over_seconds: float) -> None:
        """Tell everybody to connect elsewhere, then close their connections, spread over a moment."""
        leaving = list(self.connections)
        for connection in leaving:
            connection.send_soon(encode(Goaway("restarting", deadline)))
        pause = over_seconds / max(len(leaving), 1)
        for connection in leaving:
            await asyncio.sleep(pause)
            connection.close_soon(CloseCode.RESTARTING, "restarting")

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        if not self._is_origin_allowed(scope):
            return CloseCode.FORBIDDEN, "pages of this origin may not connect (ALLOWED_ORIGINS)"
        if self.node.is_draining:
            return CloseCode.RESTARTING, "restarting"
        if len(self.connections) >= self.settings.connections_max:
            return CloseCode.OVERLOADED, "this node has as many connections as it may"
        return None

    def _is_origin_allowed(self, scope: Scope) -> bool:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"] if name in (b"origin", b"host")}
        origin = headers.get(b"origin")
        if origin is None:  # not a browser
            return True
        try:
            own = urlsplit(origin).netloc.lower()
        except ValueError:
            return False
        is_own = own != "" and own == headers.get(b"host", "").lower()
        return is_own or origin.lower() in self.settings.allowed_origins
