"""One turn as the AI SDK's UI message stream: its chunks as server-sent events."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

from anynode.server.api.ai_sdk.fold import Chunks, whole
from anynode.server.engine.node import Node
from anynode.server.engine.turn_reader import TurnInterrupted, TurnRef
from anynode.server.transport.http import AnyApiRequest
from anynode.server.transport.sse import EventStream, sse_data

_HEADERS: Final = [(b"x-vercel-ai-ui-message-stream", b"v1")]
_DONE: Final = sse_data("[DONE]")


def chunk_stream(
    node: Node, request: AnyApiRequest, turn: TurnRef, *, is_new: bool, heartbeat_seconds: float
) -> EventStream:
    """Return the stream that shows a turn from its beginning.

    What has been said when it begins (nothing, where the turn `is_new`) comes in as few chunks as show it. A stream
    that cannot go on to the turn's end breaks off as if the network had failed: clients then resume, and would take
    any other end for the turn's. It breaks off also where the node goes down, where the token runs out, and where a
    takeover takes back what was shown. Versions 5 and 6 of the SDK cannot be told of that, and what they are shown
    when they resume is right.
    """
    return EventStream(
        node=node,
        request=request,
        pieces=_pieces(node, turn, catches_up=not is_new),
        last_words=lambda error: b"",  # the stream breaks off, and the client resumes
        heartbeat_seconds=heartbeat_seconds,
        headers=_HEADERS,
    )


async def _pieces(node: Node, turn: TurnRef, *, catches_up: bool) -> AsyncGenerator[bytes, None]:
    chunks = Chunks(str(turn.turn_id))
    is_behind = catches_up
    async with aclosing(node.turns.events(turn, is_whole=True, catches_up=catches_up)) as batches:
        async for events in batches:
            if is_behind:
                is_behind = False
                shown = whole(chunks, events)
            else:
                shown = [chunk for event in events for chunk in chunks.take(event)]
                if chunks.takes_back:
                    raise TurnInterrupted
            del events
            if shown:
                yield b"".join(map(sse_data, shown))
            del shown
    yield _DONE
