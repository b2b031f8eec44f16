"""Uvicorn's WebSocket connection, with bounds on what a peer may send, hold and keep open.

What a peer sends is cut into pieces before the parser sees it: a piece holds at most one message and some control
frames. A message is parsed only once the application waits for one, and meanwhile nothing but pings and pongs; until
the client has authenticated, not even these. So a peer cannot make the node work faster than the application takes its
messages, and no piece holds the event loop for more than a millisecond.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

from uvicorn._types import ASGIReceiveEvent, ASGISendEvent
from uvicorn.config import Config
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState
from websockets import http11
from websockets.exceptions import SecurityError
from websockets.frames import Frame
from websockets.http11 import Request

from anynode.server import metrics
from anynode.server.errors import CloseCode
from anynode.server.transport.bounded_http import HEAD_BYTES_MAX
from anynode.server.transport.connection import AUTHENTICATED
from anynode.server.transport.input_budget import FrameHeaders, InputBudget, Rates
from anynode.server.transport.peers import Peers

logger = logging.getLogger("anynode.websocket")

FRAGMENTS_MAX: Final = 1024  # pieces of one message; smaller ones would cost far more memory than their bytes
WRITE_BUFFER_MAX: Final = 1_048_576  # bytes; past it a peer that pings but never reads is dropped
LINGERING_SECONDS: Final = 1.0  # how long a peer may take to read why its connection fails …
LINGERING_BYTES_MAX: Final = 1_048_576  # … and how much of what it sends meanwhile is read and dropped
CLOSE_SECONDS_MAX: Final = 5.0  # for a peer to answer a close frame …
FIRST_CLOSE_SECONDS_MAX: Final = 1.0  # … and for one that has not authenticated: it is counted no more
MESSAGE_SECONDS_MAX: Final = 30.0  # for a message to come whole
FRAMES_AT_ONCE: Final = 64  # that are parsed before other connections have their turn, about 0.3 ms
# The frames of a client are limited once more when they are obeyed (FRAMES_BURST, REFUSALS_MAX): it can send 1,500 at
# once and is told so by errors. This burst leaves room for those, and for 1,024 fragments with pings in between.
FRAMES_BURST: Final = 2_000
FRAMES_PER_SECOND: Final = 200.0
BYTES_BURST_MIN: Final = 1_048_576  # or twice the longest message, which takes a node some milliseconds to decode
BYTES_PER_SECOND: Final = 1_048_576.0
# A token has at most 16,384 characters. A client may send it in fragments, ping, and correct a wrong first frame.
FIRST_MESSAGE_BYTES_MAX: Final = 65_536
FIRST_FRAMES_MAX: Final = 16
FIRST_RATES: Final = Rates(FIRST_FRAMES_MAX, 0.0, 2 * FIRST_MESSAGE_BYTES_MAX, 0.0)


def accept_long_lines() -> None:
    """Let lines of a handshake be as long as a head: tokens and cookies are longer than the 8 kB of websockets."""
    http11.MAX_LINE_LENGTH = HEAD_BYTES_MAX


class BoundedWebSocket(WebSocketsSansIOProtocol):
    """One WebSocket.

    `longer_messages` gives the longest message of paths where it is not that of all others. The scope has a function
    that lifts the stricter bounds once the client has authenticated.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        peers: Peers,
        longer_messages: Mapping[str, int],
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.close_timeout = FIRST_CLOSE_SECONDS_MAX
        self.is_lingering = False  # the connection has failed, and the peer is given a moment to read why
        self.lingered_bytes = 0  # what it has sent since
        self._peers = peers
        self._longer_messages = longer_messages
        self._message_bytes_max = 0
        self._is_authenticated = False
        self._is_awaited = False  # the application waits for a message
        self._headers = FrameHeaders()
        self._budget = InputBudget(FIRST_RATES, self.loop.time())
        self._input = b""  # has come and is not parsed yet, from `_offset` on
        self._offset = 0
        self._wait: asyncio.Handle | None = None  # until it rings, nothing is parsed
        self._part_bytes = 0  # of a message that has been parsed in part
        self._held_bytes = 0  # what `_peers` has counted
        self._message_began = 0.0
        self._message_timer: asyncio.TimerHandle | None = None

    # The handshake.

    def handle_connect(self, event: Request) -> None:
        """Begin the connection, with the bounds of a client that has not authenticated."""
        path = event.path.partition("?")[0]
        self._message_bytes_max = self._longer_messages.get(path, self.config.ws_max_size)
        self.conn.max_message_size = min(self._message_bytes_max, FIRST_MESSAGE_BYTES_MAX)
        super().handle_connect(event)
        if self.handshake_complete:  # it is refused
            metrics.handshakes_refused.inc()
        else:
            self.scope[AUTHENTICATED] = self._lift_first_bounds  # type: ignore[typeddict-unknown-key]

    def _refuse_handshake(self) -> None:
        """Answer a handshake that websockets cannot parse. It would leave the peer without an answer, and open."""
        error = self.conn.handshake_exc
        is_long = isinstance(error, SecurityError) or isinstance(getattr(error, "__cause__", None), SecurityError)
        status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE if is_long else HTTPStatus.BAD_REQUEST
        text = "The handshake has too many headers.\n" if is_long else "This is no WebSocket handshake.\n"
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\nConnection: close\r\n"
        head += f"Content-Type: text/plain; charset=utf-8\r\nContent-Length: {len(text)}\r\n\r\n"
        metrics.handshakes_refused.inc()
        self.handshake_complete = True
        self._linger((head + text).encode())

    def _lift_first_bounds(self) -> None:
        self._is_authenticated = True
        self.close_timeout = CLOSE_SECONDS_MAX
        bytes_burst = max(BYTES_BURST_MIN, 2 * self._message_bytes_max)
        rates = Rates(FRAMES_BURST, FRAMES_PER_SECOND, bytes_burst, BYTES_PER_SECOND)
        self._budget = InputBudget(rates, self.loop.time())
        self.conn.max_message_size = self._message_bytes_max
        self._read_on()

    # What comes in.

    def data_received(self, data: bytes) -> None:
        """Take what was received; discard it when the connection has failed already."""
        if not self.handshake_initiated:
            super().data_received(data)
            if not self.handshake_initiated:
                self._refuse_handshake()
        elif self.is_lingering:
            self.lingered_bytes += len(data)
            if self.lingered_bytes > LINGERING_BYTES_MAX:
                self._pause_or_resume(True)
        else:
            self._input = self._input[self._offset :] + data if self._input else data
            self._offset = 0
            self._read_on()

    async def receive(self) -> ASGIReceiveEvent:
        """Wait for the next message. Nothing more is parsed while there is one."""
        self._is_awaited = True
        if self._input:
            self._read_on()
        try:
            return await self.queue.get()
        finally:
            self._is_awaited = False
            if self._input:
                self._read_on()
            elif self.read_paused and self._wait is None and self.queue.empty():
                self._pause_or_resume(False)

    def _read_on(self) -> None:
        """Parse what has come, as far as the application and the budget let it, then read more or stop reading."""
        frames_left = FRAMES_AT_ONCE
        while self._offset < len(self._input) and not self._is_held_up():
            start = self._offset
            end, frames = self._headers.cut(self._input, start, frames_left if self._is_awaited else 1)
            seconds = self._budget.take(frames, end - start, self.loop.time())
            if seconds == math.inf:
                self._fail(CloseCode.LIMITS, "too much was sent at once", "input")
                return
            self._offset = end
            super().data_received(self._input[start:end])
            if self.is_lingering or self.transport.is_closing():
                self._drop_input()
                return
            self._count_part(end - start)
            frames_left -= frames
            if seconds:
                self._wait = self.loop.call_later(seconds, self._go_on)
            elif frames_left <= 0:
                self._wait = self.loop.call_soon(self._go_on)
        if self._offset >= len(self._input):
            self._input, self._offset = b"", 0
        self._hold(self._part_bytes + len(self._input) - self._offset)
        if not self.is_lingering:
            is_awaiting_application = not self.queue.empty() and not self.close_sent
            self._pause_or_resume(bool(self._input) or self._wait is not None or is_awaiting_application)

    def _is_held_up(self) -> bool:
        """Whether what comes next has to wait."""
        if self._wait is not None:
            return True
        if self.close_sent:
            return False  # only the peer's close frame is of interest, and messages are dropped
        if not self.handshake_complete or not self.queue.empty():
            return True
        if self._is_awaited:
            return False
        # Anything else may end the connection before the answer to an earlier message is out.
        return not (self._is_authenticated and self._headers.is_ping(self._input, self._offset))

    def _go_on(self) -> None:
        self._wait = None
        self._read_on()

    def _pause_or_resume(self, is_full: bool) -> None:
        if is_full != self.read_paused and not self.transport.is_closing():
            self.read_paused = is_full
            if is_full:
                self.transport.pause_reading()
            else:
                self.transport.resume_reading()

    # Messages that have come in part.

    def _count_part(self, length: int) -> None:
        if self._headers.is_between_messages:
            self._part_bytes = 0
            return
        if not self._part_bytes:
            self._message_began = self.loop.time()
            if self._message_timer is None:
                self._message_timer = self.loop.call_later(MESSAGE_SECONDS_MAX, self._check_message)
        self._part_bytes += length

    def _check_message(self) -> None:
        """Fail the connection when a message has taken too long, unless it was the node that did not read on."""
        self._message_timer = None
        if not self._part_bytes or self.is_lingering or self.close_sent:
            return
        if self.read_paused:
            self._message_began = self.loop.time()
        left = self._message_began + MESSAGE_SECONDS_MAX - self.loop.time()
        if left <= 0:
            text = f"a message did not come whole within {MESSAGE_SECONDS_MAX:g} seconds"
            self._fail(CloseCode.LIMITS, text, "message_seconds")
        else:
            self._message_timer = self.loop.call_later(left, self._check_message)

    def _hold(self, held_bytes: int) -> None:
        """Count what the connection holds; fail it where all connections together hold too much."""
        more, self._held_bytes = held_bytes - self._held_bytes, held_bytes
        if more and not self._peers.hold(more) and more > 0:
            self._fail(CloseCode.LIMITS, "this node is at its limit of unfinished messages", "unfinished_bytes")

    def _drop_input(self) -> None:
        self._input, self._offset, self._part_bytes, self.frames = b"", 0, 0, []
        self.conn.reader.discard()
        self._hold(0)

    def handle_cont(self, event: Frame) -> None:
        """Take a fragment of a message; fail the connection when the message has too many of them."""
        if self.is_lingering:
            return
        if len(self.frames) >= FRAGMENTS_MAX:
            self._fail(CloseCode.LIMITS, "too many fragments", "fragments")
            return
        super().handle_cont(event)

    def handle_ping(self) -> None:
        """Answer a ping; drop a peer that does not read the answers."""
        if self.transport.get_write_buffer_size() > WRITE_BUFFER_MAX:
            self.transport.abort()
            return
        super().handle_ping()

    # What goes out.

    async def send(self, message: ASGISendEvent) -> None:
        """Send a message. Raises ClientDisconnected, an OSError, once either side has ended the connection.

        A long frame is sent when the peer has read it, up to what the kernel holds: what was read for it counts until
        then.
        """
        await self._wait_writable()
        if self.close_sent:
            raise ClientDisconnected
        await super().send(message)
        if self.close_sent:
            self._read_on()  # for the peer's close frame
        else:
            await self._wait_writable()

    async def _wait_writable(self) -> None:
        while not self.writable.is_set():
            await self.writable.wait()

    # The end.

    def _fail(self, code: CloseCode, reason: str, bound: str) -> None:
        """Close a connection whose peer has passed a bound."""
        metrics.peers_cut.labels(bound).inc()
        if self.conn.close_sent is not None:  # the peer has been told of another end, and may still read of it
            self._linger(b"")
            return
        self.conn.fail(code, reason)
        self.handle_parser_exception()

    def handle_parser_exception(self) -> None:
        """Tell the peer why the connection fails."""
        assert self.conn.close_sent is not None
        self.queue.put_nowait({"type": "websocket.disconnect", "code": self.conn.close_sent.code})
        self._linger(b"".join(self.conn.data_to_send()))

    def _linger(self, last_words: bytes) -> None:
        """Send the last words and give the peer a moment to read them. A socket that is closed with input unread is
        reset, and they would be lost."""
        self.transport.write(last_words)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.close_sent = self.is_lingering = True
        self._drop_input()
        if self.close_timer is not None:
            self.close_timer.cancel()
        self.close_timer = self.loop.call_later(LINGERING_SECONDS, self.transport.close)
        self._pause_or_resume(False)

    def keepalive_timeout(self) -> None:
        """Drop the socket of a peer that answers no ping: closing it would wait for the peer to read."""
        super().keepalive_timeout()
        self.transport.abort()

    def shutdown(self) -> None:
        """Close the connection as the node goes down. One that cannot be closed any more is dropped, so that it does
        not keep the others from their closing handshakes."""
        try:
            super().shutdown()
        except Exception:
            logger.exception("a connection could not be closed")
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the connection, and let go of all that it held without waiting for the garbage collector."""
        super().connection_lost(exc)
        for timer in (self._wait, self._message_timer):
            if timer is not None:
                timer.cancel()
        self._drop_input()
        metrics.tcp_connections.dec()
        self._peers.remove(self)
        # Its parser is a generator whose frame holds the connection that holds it; so does the frame of its error.
        self.conn.parser.close()
        self.conn.parser_exc = self.conn.handshake_exc = None
        if self.handshake_initiated and hasattr(self, "scope"):
            self.scope.pop(AUTHENTICATED, None)  # type: ignore[typeddict-item]

    def cut_off(self) -> None:
        """End the connection at once."""
        self.transport.abort()
