"""A client of an ASGI application without a server in between: it says what a test tells it, and keeps what it gets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import unquote

from starlette.types import ASGIApp, Message, Scope

WAIT_SECONDS_MAX = 5.0  # for what an application has to do; a test whose application never does it fails


class Peer:
    """A client of an ASGI application. Once it `is_gone`, what is sent to it fails."""

    def __init__(self, *said: Message) -> None:
        self.sent: list[Message] = []
        self.is_gone = False
        self._said: asyncio.Queue[Message] = asyncio.Queue()
        self._is_handling = False
        self._is_sent = asyncio.Event()
        for message in said:
            self.say(message)

    def say(self, message: Message) -> None:
        """Send a message to the application."""
        self._said.put_nowait(message)

    async def receive(self) -> Message:
        """Give the application the next message; wait for one where there is none."""
        if self._is_handling:
            self._said.task_done()
        message = await self._said.get()
        self._is_handling = True
        return message

    async def wait_heard(self) -> None:
        """Wait until the application has asked for more than all that was said."""
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            await self._said.join()

    async def send(self, message: Message) -> None:
        """Take a message from the application. Raises OSError where the peer is gone."""
        if self.is_gone:
            raise OSError("the peer is gone")
        self.sent.append(message)
        self._is_sent.set()

    async def wait_sent(self, is_there: Callable[[Sequence[Message]], bool]) -> None:
        """Wait until what was sent is what a test waits for."""
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            while not is_there(self.sent):
                self._is_sent.clear()
                await self._is_sent.wait()

    @property
    def texts(self) -> list[str]:
        """The text frames of a WebSocket that were sent."""
        return [message["text"] for message in self.sent if message["type"] == "websocket.send"]

    @property
    def frames(self) -> list[Any]:
        """The text frames of a WebSocket that were sent, decoded."""
        return [json.loads(text) for text in self.texts]

    @property
    def closed(self) -> tuple[int, str] | None:
        """The close code and reason that a WebSocket was closed with, None while it is open."""
        closings = [message for message in self.sent if message["type"] == "websocket.close"]
        assert len(closings) <= 1, "it was closed more than once"
        return (closings[0]["code"], closings[0]["reason"]) if closings else None

    @property
    def status(self) -> int:
        """The status of an HTTP response."""
        status: int = self.sent[0]["status"]
        return status

    @property
    def headers(self) -> dict[str, str]:
        """The headers of an HTTP response."""
        return {name.decode(): value.decode() for name, value in self.sent[0]["headers"]}

    @property
    def body(self) -> bytes:
        """The body of an HTTP response, as far as it was sent."""
        return b"".join(message.get("body", b"") for message in self.sent[1:])

    @property
    def json(self) -> Any:
        """The body of an HTTP response, decoded."""
        return json.loads(self.body)

    @property
    def is_whole(self) -> bool:
        """Whether an HTTP response has come to its end."""
        return bool(self.sent) and self.sent[-1]["type"] == "http.response.body" and not self.sent[-1].get("more_body")


@asynccontextmanager
async def connected(peer: Peer, serving: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Serve a WebSocket meanwhile. Its peer leaves afterwards, and what serves it must then come to its end."""
    task = asyncio.create_task(serving)
    try:
        yield
    finally:
        peer.say({"type": "websocket.disconnect", "code": 1006})
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            await task


def websocket_scope(
    *,
    headers: Mapping[str, str] | None = None,
    subprotocols: Sequence[str] = (),
    query: str = "",
) -> Scope:
    """Return the scope of a WebSocket's handshake."""
    return {
        "type": "websocket",
        "path": "/ws",
        "query_string": query.encode(),
        "headers": _encoded(headers or {}),
        "subprotocols": list(subprotocols),
    }


def http_scope(
    method: str,
    path: str,
    *,
    headers: Mapping[str, str] | None = None,
    query: str = "",
    more: Mapping[str, Any] | None = None,
) -> Scope:
    """Return the scope of an HTTP request for a path as it is sent, with what a server puts into it besides."""
    return {
        "type": "http",
        "method": method,
        "path": unquote(path),
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": query.encode(),
        "headers": _encoded(headers or {}),
        **(more or {}),
    }


def body_of(data: bytes, pieces: int = 1) -> list[Message]:
    """Return the messages in which a body comes."""
    size = -(-len(data) // pieces) or 1
    parts = [data[start : start + size] for start in range(0, len(data), size)] or [b""]
    return [
        {"type": "http.request", "body": part, "more_body": number < len(parts)} for number, part in enumerate(parts, 1)
    ]


async def answered(app: ASGIApp, scope: Scope, *said: Message) -> Peer:
    """Return a peer that has been answered by an application, to the end of what it does."""
    peer = Peer(*said)
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        await app(scope, peer.receive, peer.send)
    return peer


def _encoded(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
