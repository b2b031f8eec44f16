"""Uvicorn's HTTP connection, with bounds on what a peer may send outside of bodies, and on how long it says nothing.

Input is parsed in small slices, so that the bytes of heads and trailers are counted rightly, whatever else comes with
them. Bodies are bounded where they are read.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from anynode.server import metrics
from anynode.server.transport.http import BREAK_OFF
from anynode.server.transport.peers import Peers

HTTP_IDLE_SECONDS: Final = 75  # longer than load balancers keep a connection, or they would send into a closed one
HEAD_SECONDS_MAX: Final = 10.0  # for the head of a request to come …
HEAD_BYTES_MAX: Final = 65_536  # … and how long it may be
TRAILER_BYTES_MAX: Final = 8_192  # what may come after the head and is no body; it is dropped
PIPELINED_MAX: Final = 100  # requests that come before the one in front of them is answered
LINGERING_SECONDS: Final = 1.0  # how long a peer may go on with a body that nobody reads
SLICE_BYTES: Final = 4_096  # of input that are parsed before they are counted
CHUNK_HEAD_BYTES: Final = 32  # what a piece of a chunked body may have around it


class BoundedHttp(HttpToolsProtocol):
    """One HTTP connection."""

    _head_timer: asyncio.TimerHandle

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        peers: Peers,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._peers = peers
        self._is_in_head = False
        self._is_upgraded = False
        self._loose_bytes = 0  # of the head, or behind it, that are no body

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request as long as for a later one: browsers and load balancers connect in advance."""
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(HTTP_IDLE_SECONDS, transport.abort)
        metrics.tcp_connections.inc()
        self._peers.add(self)

    def cut_off(self) -> None:
        """End the connection at once, for another one to take its place."""
        metrics.peers_cut.labels("connections").inc()
        self.transport.abort()

    # What comes in.

    def data_received(self, data: bytes) -> None:
        """Parse what was received; drop the connection when a request has too many bytes outside of its body."""
        for start in range(0, len(data), SLICE_BYTES):
            piece = data[start : start + SLICE_BYTES] if len(data) > SLICE_BYTES else data
            self._loose_bytes += len(piece)
            super().data_received(piece)
            if self._is_upgraded or self.transport.is_closing():
                return
            if self._loose_bytes > (HEAD_BYTES_MAX if self._is_in_head else TRAILER_BYTES_MAX):
                self._drop("head_bytes" if self._is_in_head else "trailer_bytes")
                return
        if self.timeout_keep_alive_task is None and self._is_idle() and not self._is_in_head:
            # Empty lines between requests have ended the time that the connection may be idle.
            self.timeout_keep_alive_task = self.loop.call_later(HTTP_IDLE_SECONDS, self.timeout_keep_alive_handler)

    def on_message_begin(self) -> None:
        """Start the time for the head of a request, and put the means to break it off into its scope."""
        self._head_timer.cancel()
        self._head_timer = self.loop.call_later(HEAD_SECONDS_MAX, self._drop, "head_seconds")
        self._is_in_head = True
        self._loose_bytes = 0
        super().on_message_begin()
        self.scope[BREAK_OFF] = self.transport.close  # type: ignore[typeddict-unknown-key]

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; drop a trailer, which nobody reads."""
        if self._is_in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Stop the time for the head of a request, as the head is complete."""
        self._head_timer.cancel()
        self._is_in_head = False
        self._loose_bytes = 0
        self._peers.set_busy(self)
        super().on_headers_complete()
        if len(self.pipeline) > PIPELINED_MAX:
            self._drop("pipelined")

    def on_chunk_header(self) -> None:
        """Take the size of a chunk for a part of the body."""
        self._loose_bytes = max(self._loose_bytes - CHUNK_HEAD_BYTES, 0)

    def on_body(self, body: bytes) -> None:
        """Take a piece of a body."""
        self._loose_bytes = max(self._loose_bytes - len(body), 0)
        super().on_body(body)

    def handle_websocket_upgrade(self) -> None:
        """Leave the connection to a WebSocket, and nothing behind that holds memory."""
        self._head_timer.cancel()
        self._is_upgraded = True
        if not self._is_idle():  # a request in front of it is being answered on the same connection
            self._drop("pipelined")
            return
        self._peers.set_busy(self)  # it stays counted until the WebSocket is lost
        super().handle_websocket_upgrade()
        self.parser = None  # type: ignore[assignment]  # it holds this object, which holds it

    # The end.

    def on_response_complete(self) -> None:
        """Close the connection soon if a request was answered before its body came: the rest is not waited for."""
        if self.cycle.response_complete and self.cycle.more_body and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(LINGERING_SECONDS, self.transport.close)
        super().on_response_complete()
        if self._is_idle() and not self.transport.is_closing():
            self._peers.set_idle(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the time for the head of a request, as the connection is lost."""
        self._head_timer.cancel()
        metrics.tcp_connections.dec()
        self._peers.remove(self)
        super().connection_lost(exc)

    def _is_idle(self) -> bool:
        """Whether no request is being answered, nor waits to be."""
        return self.cycle is None or (self.cycle.response_complete and not self.pipeline)

    def _drop(self, bound: str) -> None:
        metrics.peers_cut.labels(bound).inc()
        self.transport.abort()
