"""A conversation's journal as Server-Sent Events: the frames of the socket, each with its seq as `id`."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, Final, TypeVar
from uuid import UUID

from starlette.types import Receive, Scope, Send

from anynode.models.conversations import Snapshot
from anynode.models.database import Unavailable
from anynode.server.auth import Identity
from anynode.server.engine.follow import Update
from anynode.server.engine.node import Node
from anynode.server.errors import ClientError, DatabaseUnavailable, InternalError
from anynode.server.protocol.encoding import encode, error_frame, numbered_frames, snapshot_frame
from anynode.server.protocol.frames import Heartbeat
from anynode.server.transport.cut_short import LAST_WORDS_SECONDS, CutShort, until
from anynode.server.transport.http import break_off

logger = logging.getLogger("anynode.sse")

Item = TypeVar("Item")
RETRY_MILLISECONDS: Final = (200, 1000)  # from, to: clients of a node that goes away come back one by one
HEADERS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would collect events before it hands them on
]
COMMENT: Final = b": \n\n"  # a sign of life that clients pass over
_HEARTBEAT: Final = f"data: {encode(Heartbeat())}\n\n".encode()


class EventStream:
    """The ASGI application that shows one conversation, which is known to be the user's, until the client goes, the
    node drains or the token runs out; a client then comes back with the last `id`."""

    def __init__(
        self,
        node: Node,
        identity: Identity,
        conversation_id: UUID,
        after: int | None,
        *,
        disconnected: Callable[[], Coroutine[Any, Any, None]],
        heartbeat_seconds: float,
    ) -> None:
        self._node = node
        self._identity = identity
        self._conversation_id = conversation_id
        self._after = after
        self._disconnected = disconnected
        self._heartbeat_seconds = heartbeat_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve it to its end."""
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        if scope["method"] != "HEAD":
            retry = random.randint(*RETRY_MILLISECONDS)  # noqa: S311
            await write(send, f"retry: {retry}\n\n".encode())
            expiry_seconds = max(0.0, self._identity.expires_at - time.time())
            ends = (self._node.draining.wait(), self._disconnected(), asyncio.sleep(expiry_seconds))
            try:
                await until(self._show(send), *ends)
            except CutShort:
                pass
        await send({"type": "http.response.body", "body": b""})

    async def _show(self, send: Send) -> None:
        try:
            while True:
                try:
                    async with aclosing(self._frames()) as pieces:
                        async for piece in pieces:
                            await write(send, piece)
                except Unavailable:
                    # Say so, and go on trying from where the client is.
                    await write(send, _data(error_frame(DatabaseUnavailable(), None)))
        except ClientError as error:  # it has been deleted
            await self._last_words(send, error)
        except OSError:
            pass  # the client has gone
        except Exception:
            logger.exception("following conversation %s failed", self._conversation_id)
            await self._last_words(send, InternalError())

    async def _last_words(self, send: Send, error: ClientError) -> None:
        try:
            await write(send, _data(error_frame(error, None)))
        except OSError:
            pass

    async def _frames(self) -> AsyncGenerator[bytes, None]:
        """What to write, and a heartbeat whenever there was nothing for long."""
        user_id, conversation_id = self._identity.user_id, self._conversation_id
        steps = self._node.follows.follow(user_id, conversation_id, self._after, is_own=True)
        async with aclosing(or_silence(steps, self._heartbeat_seconds)) as heard:
            async for step in heard:
                yield _HEARTBEAT if step is None else self._encoded(step)

    def _encoded(self, step: Update) -> bytes:
        if isinstance(step, Snapshot):
            self._after = step.seq
            return _data(snapshot_frame(self._conversation_id, step), step.seq)
        self._after = step[-1].seq
        return b"".join(_data(frame, seq) for seq, frame in numbered_frames(self._conversation_id, step))


async def stream_turn(
    scope: Scope,
    send: Send,
    show: Callable[[Send], Coroutine[Any, Any, bool]],
    node: Node,
    identity: Identity,
    disconnected: Callable[[], Coroutine[Any, Any, None]],
    headers: Sequence[tuple[bytes, bytes]] = (),
) -> None:
    """Answer with a stream that `show` writes, and says whether it is whole. Where it is not, or where the client goes,
    the token runs out or the node goes down first, the connection breaks off: it must not look whole."""
    await send({"type": "http.response.start", "status": 200, "headers": [*HEADERS, *headers]})
    if scope["method"] != "HEAD":
        expiry_seconds = max(0.0, identity.expires_at - time.time())
        ends = (node.drained.wait(), disconnected(), asyncio.sleep(expiry_seconds))
        try:
            is_whole = await until(show(send), *ends, grace_seconds=LAST_WORDS_SECONDS)
        except CutShort:
            is_whole = False
        if not is_whole:
            await break_off(scope, disconnected())
            return
    await send({"type": "http.response.body", "body": b""})


async def or_silence(items: AsyncGenerator[Item, None], seconds: float) -> AsyncGenerator[Item | None, None]:
    """The items, and None whenever there was none for so long. Closes them at the end."""
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
            yield item


def _data(frame: str, seq: int | None = None) -> bytes:
    # JSON has no line break outside of its strings, and none unescaped inside.
    return (f"data: {frame}\n\n" if seq is None else f"id: {seq}\ndata: {frame}\n\n").encode()


async def write(send: Send, body: bytes) -> None:
    """Some more of a stream."""
    await send({"type": "http.response.body", "body": body, "more_body": True})
