"""The load: a raw WebSocket client that is cheap enough not to be the bottleneck, and clients that ask with it.

What the servers send is read by searching bytes, which is safe for the agents' tokens: digits, letters and spaces.
"""

from __future__ import annotations

import asyncio
import base64
import os
import time
import uuid
from array import array
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias, cast
from uuid import UUID

TEXT: Final = 0x81  # first byte of an unfragmented text frame
CLOSE: Final = 0x88
PING: Final = 0x89
PONG: Final = 0x8A
CONNECTING_AT_ONCE: Final = 100
ANSWER_SECONDS_MAX: Final = 120.0

OnText: TypeAlias = "Callable[[bytes], None]"
OnEnd: TypeAlias = "Callable[[LoadError], None]"

_DELTA: Final = b'{"type":"turn.delta"'
_COMPLETED: Final = b'{"type":"turn.completed"'
_FAILURES: Final = (b'{"type":"error"', b'{"type":"turn.failed"', b'{"type":"turn.cancelled"', b'{"type":"goaway"')
_BEFORE_TEXT: Final = b'"text":'
_BEFORE_CHUNK: Final = b',"chunk":'
_TEXT_DELTA: Final = b'{"type":"text-delta"'
_BEFORE_DELTA: Final = b'"delta":"'
_FINISH: Final = b'{"type":"finish"'
_END: Final = b'{"type":"end"'


class LoadError(Exception):
    """A server did not do the work that is measured, so its figures would mean nothing."""


class FrameParser:
    """Cuts a server's bytes into frames (first byte, payload). No I/O."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """Return the frames that this data completes. Raises LoadError for a masked one."""
        if self._rest:
            data = self._rest + data
        frames = []
        start, size = 0, len(data)
        while size - start >= 2:
            length, content = data[start + 1], start + 2
            if length >= 126:
                if length > 127:
                    raise LoadError("a server's frame is masked")
                content += 2 if length == 126 else 8
                if content > size:
                    break
                length = int.from_bytes(data[start + 2 : content], "big")
            end = content + length
            if end > size:
                break
            frames.append((data[start], data[content:end]))
            start = end
        self._rest = data[start:]
        return frames


def client_frame(first_byte: int, payload: bytes) -> bytes:
    """Return a client's frame. Its mask is zero: RFC 6455 permits that, and it costs nothing."""
    length = len(payload)
    if length < 126:
        head = bytes((first_byte, 0x80 | length))
    elif length < 65_536:
        head = bytes((first_byte, 0xFE)) + length.to_bytes(2, "big")
    else:
        head = bytes((first_byte, 0xFF)) + length.to_bytes(8, "big")
    return head + b"\0\0\0\0" + payload


class Connection(asyncio.Protocol):
    """One WebSocket. `opened` is done at the server's first frame, which it sends when it has accepted the token; a
    server that `is_silent` sends none."""

    __slots__ = ("_handshake", "_is_silent", "_on_end", "_on_text", "_parser", "_request", "_transport", "opened")

    def __init__(self, request: bytes, on_text: OnText, on_end: OnEnd, *, is_silent: bool) -> None:
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._on_text = on_text
        self._on_end = on_end
        self._is_silent = is_silent
        self._handshake: bytes | None = b""  # its bytes so far; None when it is over
        self._parser = FrameParser()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask for the upgrade."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not a subclass
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Hand on the texts, answer pings."""
        if self._handshake is not None:
            head, end, data = (self._handshake + data).partition(b"\r\n\r\n")
            if not end:
                self._handshake = head
                return
            self._handshake = None
            if not head.startswith(b"HTTP/1.1 101 "):
                self._fail(f"the server refuses: {head[:60]!r}")
                return
            if self._is_silent:
                self.opened.set_result(None)
        for first_byte, payload in self._parser.feed(data):
            if first_byte == TEXT:
                if self.opened.done():
                    self._on_text(payload)
                else:
                    self.opened.set_result(None)
            elif first_byte == PING:
                self._write(client_frame(PONG, payload))
            else:
                self._fail(f"the server sends a frame that begins with {first_byte:#x}: {payload[:60]!r}")

    def connection_lost(self, exc: Exception | None) -> None:
        """Wake up all waiters."""
        self._fail("the server closed the connection")

    def send(self, text: bytes) -> None:
        """Send a text frame."""
        self._write(client_frame(TEXT, text))

    def abort(self) -> None:
        """Drop the connection."""
        if self._transport is not None:
            self._transport.abort()

    def _write(self, data: bytes) -> None:
        assert self._transport is not None
        self._transport.write(data)

    def _fail(self, reason: str) -> None:
        error = LoadError(reason)
        if self.opened.done():
            self._on_end(error)
        else:
            self.opened.set_exception(error)
        self.abort()


async def connect(
    port: int,
    token: str,
    on_text: OnText = lambda text: None,
    on_end: OnEnd = lambda error: None,
    *,
    path: str = "/ws",
    subprotocol: str = "anynode.v1",
    is_silent: bool = False,
) -> Connection:
    """Open an authenticated connection. Raises LoadError or OSError."""
    key = base64.b64encode(os.urandom(16)).decode()
    request = (
        f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: {subprotocol}\r\n"
        f"Authorization: Bearer {token}\r\n\r\n"
    ).encode()
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(
        lambda: Connection(request, on_text, on_end, is_silent=is_silent), "127.0.0.1", port
    )
    async with asyncio.timeout(30):
        await connection.opened
    return connection


async def connect_many(port: int, token: str, count: int) -> list[Connection]:
    """Open `count` idle connections."""
    connections: list[Connection] = []
    while len(connections) < count:
        batch = min(CONNECTING_AT_ONCE, count - len(connections))
        connections += await asyncio.gather(*(connect(port, token) for _ in range(batch)))
    return connections


class Chat:
    """A client that asks in one conversation at a time, turn after turn.

    `tokens` and `frames` count what has come; `delays`, when it is set, takes the delay of each timed token in ns.
    """

    def __init__(self, conversation_id: UUID) -> None:
        self.conversation_id = conversation_id
        self.tokens = 0
        self.frames = 0
        self.delays: array[int] | None = None
        self.first_token_at = 0.0
        self._is_first = False
        self._done: asyncio.Future[None] | None = None
        self._connection: Connection | None = None

    async def open(self, port: int, token: str) -> None:
        """Connect."""
        self._connection = await connect(port, token, self._hear, self._fail)

    def ask(self) -> asyncio.Future[None]:
        """Send a message; the future is done at the end of its turn."""
        assert self._connection is not None
        self._done = asyncio.get_running_loop().create_future()
        self._done.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody need look at it
        self._is_first = True
        self._connection.send(self._question().encode())
        return self._done

    def _question(self) -> str:
        return (
            f'{{"type":"message.send","conversation_id":"{self.conversation_id}",'
            f'"message_id":"{uuid.uuid4()}","content":"What is new?"}}'
        )

    async def ask_turns(self, turns: int, tokens_each: int, *, after_seconds: float = 0.0) -> None:
        """Ask again and again. Raises LoadError unless every answer is complete."""
        await asyncio.sleep(after_seconds)
        for _ in range(turns):
            before = self.tokens
            async with asyncio.timeout(ANSWER_SECONDS_MAX):
                await self.ask()
            if self.tokens - before != tokens_each:
                raise LoadError(f"an answer has {self.tokens - before} tokens, not {tokens_each}")

    async def first_token_seconds(self) -> float:
        """Return the seconds from sending a message to its first token, once the turn is over."""
        started = time.perf_counter()
        async with asyncio.timeout(ANSWER_SECONDS_MAX):
            await self.ask()
        return self.first_token_at - started

    def close(self) -> None:
        """Drop the connection."""
        if self._connection is not None:
            self._connection.abort()

    def _hear(self, frame: bytes) -> None:
        if frame.startswith(_DELTA):
            if self._is_first:
                self.first_token_at = time.perf_counter()
                self._is_first = False
            self.frames += 1
            text = text_in(frame)
            self.tokens += text.count(b" ")
            if self.delays is not None:
                now = time.monotonic_ns()
                self.delays.extend([now - int(at) for at in text.split()])
        elif self._done is not None and not self._done.done():
            if frame.startswith(_COMPLETED):
                self._done.set_result(None)
            elif frame.startswith(_FAILURES):
                self._fail(LoadError(frame.decode()))

    def _fail(self, error: LoadError) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)


class UiChat(Chat):
    """A client on the AI SDK's wire, as its `WebSocketChatTransport` speaks it."""

    async def open(self, port: int, token: str) -> None:
        """Connect."""
        self._has_finished = False
        self._connection = await connect(
            port, token, self._hear, self._fail, path="/api/chat", subprotocol="anynode.ai-sdk", is_silent=True
        )

    def _question(self) -> str:
        self._has_finished = False
        return (
            f'{{"type":"send","requestId":"{uuid.uuid4().hex[:16]}","id":"{self.conversation_id}",'
            f'"trigger":"submit-message","messages":[{{"id":"{uuid.uuid4().hex[:16]}","role":"user",'
            '"parts":[{"type":"text","text":"What is new?"}]}],"headers":{},"body":{}}'
        )

    def _hear(self, frame: bytes) -> None:
        chunk = frame.partition(_BEFORE_CHUNK)[2]
        if chunk.startswith(_TEXT_DELTA):
            self.frames += 1
            self.tokens += chunk.partition(_BEFORE_DELTA)[2].count(b" ")
        elif chunk.startswith(_FINISH):
            self._has_finished = True
        elif not chunk and self._done is not None and not self._done.done():
            if frame.startswith(_END) and self._has_finished:
                self._done.set_result(None)
            else:
                self._fail(LoadError(frame.decode()))


def text_in(frame: bytes) -> bytes:
    """Return the text of a delta's frame; several tokens may be merged in it, each followed by a space."""
    # Postgres' jsonb puts a space after the colon.
    start = frame.index(b'"', frame.index(_BEFORE_TEXT) + len(_BEFORE_TEXT)) + 1
    return frame[start : frame.index(b'"', start)]


async def open_chats(port: int, token: str, conversation_ids: Sequence[UUID], kind: type[Chat] = Chat) -> list[Chat]:
    """Connect a client for each conversation."""
    chats = [kind(conversation_id) for conversation_id in conversation_ids]
    for start in range(0, len(chats), CONNECTING_AT_ONCE):
        await asyncio.gather(*(chat.open(port, token) for chat in chats[start : start + CONNECTING_AT_ONCE]))
    return chats
