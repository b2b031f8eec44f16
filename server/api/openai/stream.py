"""One turn as a stream of the OpenAI Responses API, which any node can go on with."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

from anynode.server.api.openai.bodies import response_id_of
from anynode.server.api.openai.fold import Fold
from anynode.server.api.openai.wire import ErrorEvent, StreamEvent
from anynode.server.engine.node import Node
from anynode.server.engine.turn_reader import TurnInterrupted, TurnRef
from anynode.server.errors import ClientError, DatabaseUnavailable
from anynode.server.protocol.encoding import encode
from anynode.server.transport.http import AnyApiRequest
from anynode.server.transport.sse import EventStream, sse_data

logger = logging.getLogger("anynode.responses")

EVENTS_AT_ONCE: Final = 200  # of the journal, that a stream takes without letting others run: about a millisecond


def response_stream(
    node: Node,
    request: AnyApiRequest,
    turn: TurnRef,
    after: int | None,
    model: str,
    *,
    heartbeat_seconds: float,
) -> EventStream:
    """Return the stream that shows a turn from its start, or after the sequence number `after`, to its end.

    Where it is cut before (the client goes, the token runs out, the node goes down), the connection breaks off.
    """
    fold = Fold(turn.turn_id, turn.conversation_id, model)
    shown_to = -1 if after is None else after

    def last_words(error: ClientError) -> bytes:
        if isinstance(error, TurnInterrupted | DatabaseUnavailable):  # another request may show it to its end
            logger.warning("response %s cannot be shown: %s", response_id_of(turn.turn_id), error)
            return b""
        number = max(fold.sequence_number, shown_to + 1)
        return _data(ErrorEvent(error.code, error.message, number))

    return EventStream(
        node=node,
        request=request,
        pieces=_pieces(node, turn, fold, shown_to),
        last_words=last_words,
        heartbeat_seconds=heartbeat_seconds,
    )


async def _pieces(node: Node, turn: TurnRef, fold: Fold, shown_to: int) -> AsyncGenerator[bytes, None]:
    async with aclosing(node.turns.events(turn, is_whole=shown_to < 0)) as batches:
        async for events in batches:
            for start in range(0, len(events), EVENTS_AT_ONCE):
                added = [shown for event in events[start : start + EVENTS_AT_ONCE] for shown in fold.add(event)]
                if piece := b"".join(_data(event) for event in added if event.sequence_number > shown_to):
                    yield piece
                del added, piece
                await asyncio.sleep(0)  # other turns go on, however much there is to catch up with
            del events


def _data(event: StreamEvent | ErrorEvent) -> bytes:
    return sse_data(encode(event), event=str(type(event).__struct_config__.tag))
