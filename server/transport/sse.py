"""Streams of server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final, TypeVar

from starlette.types import Receive, Scope, Send

from anynode.server.engine.node import Node
from anynode.server.errors import ClientError
from anynode.server.transport.cut_short import LAST_WORDS_SECONDS, CutShort, run_unless
from anynode.server.transport.failures import show_to_end
from anynode.server.transport.http import AnyApiRequest, break_off

logger = logging.getLogger("anynode.sse")

Item = TypeVar("Item")
HEADERS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would collect events before it hands them on
]
LONG_BYTES_MIN: Final = 65_536  # of a piece that a server does not take without the client's reading
COMMENT: Final = b": \n\n"  # a sign of life that clients pass over


@dataclass(frozen=True, slots=True, kw_only=True)
class EventStream:
    """The ASGI application that writes `pieces` to the client, and `heartbeat` when none came for `heartbeat_seconds`.

    It is cut short when the client goes, when the token runs out or is revoked, and when the node goes down.
    `last_words` are written where it ends with an error. A stream that `must_be_whole` shows one turn: where it does
    not come to its end the connection breaks off, so that no client takes it for whole, and it may go on until no turn
    runs on this node any more. Other streams end when the node begins to drain, and their clients come back with the
    last `id`.
    """

    node: Node
    request: AnyApiRequest
    pieces: AsyncGenerator[bytes, None]
    last_words: Callable[[ClientError], bytes]
    heartbeat_seconds: float
    heartbeat: bytes = COMMENT
    headers: Sequence[tuple[bytes, bytes]] = ()
    must_be_whole: bool = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the stream to its end."""
        await send({"type": "http.response.start", "status": 200, "headers": [*HEADERS, *self.headers]})
        if scope["method"] != "HEAD":
            is_whole = await self._show(send)
            if self.must_be_whole and not is_whole:
                await break_off(scope, self.request)
                return
        await send({"type": "http.response.body", "body": b""})

    async def _show(self, send: Send) -> bool:
        async def say_last_words(error: ClientError) -> None:
            await _write(send, self.last_words(error))

        is_going_down = self.node.drained if self.must_be_whole else self.node.draining
        expiry_seconds = max(0.0, self.request.identity.expires_at - time.time())
        try:
            return await run_unless(
                show_to_end(self._write_all(send), say_last_words, logger, "a stream"),
                is_going_down.wait(),
                self.request.wait_disconnected(),
                asyncio.sleep(expiry_seconds),
                self.request.revoked.wait(),
                grace_seconds=LAST_WORDS_SECONDS if self.must_be_whole else 0.0,
            )
        except CutShort:
            return False

    async def _write_all(self, send: Send) -> None:
        async with aclosing(or_silence(self.pieces, self.heartbeat_seconds)) as pieces:
            async for piece in pieces:
                await _write(send, self.heartbeat if piece is None else piece)
                del piece  # a stream that waits keeps nothing of what it has shown


async def or_silence(items: AsyncGenerator[Item, None], seconds: float) -> AsyncGenerator[Item | None, None]:
    """Yield the items, and None whenever none came for `seconds`. Closes them at the end."""
    async with aclosing(items):
        while True:
            next_item = asyncio.ensure_future(anext(items))
            try:
                while not (await asyncio.wait((next_item,), timeout=seconds))[0]:
                    yield None
            finally:
                next_item.cancel()
                await asyncio.wait((next_item,))
            try:
                item = next_item.result()
            except StopAsyncIteration:
                return
            del next_item
            yield item
            del item


def sse_data(data: str, *, id: int | None = None, event: str | None = None) -> bytes:
    """Return one server-sent event with a line of data: JSON has no line break outside of its strings, and none
    unescaped inside."""
    head = ("" if id is None else f"id: {id}\n") + ("" if event is None else f"event: {event}\n")
    return f"{head}data: {data}\n\n".encode()


async def _write(send: Send, body: bytes) -> None:
    if body:
        await send({"type": "http.response.body", "body": body, "more_body": True})
    if len(body) > LONG_BYTES_MIN:
        # The server waits for the client to read before it sends, not after. So here too the next piece is asked for
        # only when this one has been read.
        await send({"type": "http.response.body", "body": b"", "more_body": True})
