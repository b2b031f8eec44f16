"""A turn as the AI SDK's UI message stream: its chunks as Server-Sent Events."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, Final
from uuid import UUID

from starlette.types import Receive, Scope, Send

from anynode.models.database import Database, Unavailable
from anynode.models.events import Event
from anynode.models.rules import TERMINAL_EVENTS
from anynode.server.api.ai_sdk.fold import Chunks, whole
from anynode.server.auth import Identity
from anynode.server.engine.node import Node
from anynode.server.errors import ClientError
from anynode.server.transport.sse import COMMENT, or_silence, stream_turn, write
from anynode.server.transport.turn_end import stored_turn
from anynode.server.transport.turn_events import JournalGone, events_of_stored, events_of_turn, events_so_far

logger = logging.getLogger("anynode.sse")

_HEADERS: Final = [(b"x-vercel-ai-ui-message-stream", b"v1")]
_DONE: Final = b"data: [DONE]\n\n"
_TERMINAL = frozenset(TERMINAL_EVENTS.values())


class ChunkStream:
    """The ASGI application that shows one turn from its beginning, in a conversation that is known to be the user's.

    What has been said when it begins (nothing, where the turn `is_new`) comes in as few chunks as show it. A stream
    that cannot go on to the turn's end breaks off as if the network had failed: clients resume then, and would take any
    other end for the turn's. So it does where the node goes down, where the token runs out, and where a takeover takes
    back what was shown, which versions 5 and 6 cannot be told of: what they are shown when they resume is right.
    """

    def __init__(
        self,
        node: Node,
        database: Database,
        identity: Identity,
        conversation_id: UUID,
        turn_id: UUID,
        first_seq: int | None,
        *,
        is_new: bool,
        disconnected: Callable[[], Coroutine[Any, Any, None]],
        heartbeat_seconds: float,
    ) -> None:
        self._node = node
        self._database = database
        self._identity = identity
        self._conversation_id = conversation_id
        self._turn_id = turn_id
        self._first_seq = first_seq
        self._is_new = is_new
        self._disconnected = disconnected
        self._heartbeat_seconds = heartbeat_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve it to its end."""
        await stream_turn(scope, send, self._show, self._node, self._identity, self._disconnected, _HEADERS)

    async def _show(self, send: Send) -> bool:
        """Show all of it; returns whether it is whole."""
        try:
            async with aclosing(self._pieces()) as pieces:
                async for piece in pieces:
                    await write(send, piece)
        except (ClientError, JournalGone, Unavailable) as error:
            logger.info("turn %s cannot be shown to its end: %s", self._turn_id, error)
            return False
        except OSError:
            return False  # the client has gone
        except Exception:
            logger.exception("turn %s could not be shown", self._turn_id)
            return False
        return True

    async def _pieces(self) -> AsyncGenerator[bytes, None]:
        """What to write."""
        chunks = Chunks(str(self._turn_id))
        events = await self._events_so_far()
        if events:
            yield _data(whole(chunks, events))
        if not (events and events[-1].type in _TERMINAL):
            assert self._first_seq is not None
            next_seq = events[-1].seq + 1 if events else self._first_seq
            live = events_of_turn(
                self._node.follows, self._identity.user_id, self._conversation_id, self._turn_id, next_seq
            )
            async with aclosing(or_silence(live, self._heartbeat_seconds)) as batches:
                async for batch in batches:
                    if batch is None:
                        yield COMMENT
                        continue
                    shown = [chunk for event in batch for chunk in chunks.take(event)]
                    if chunks.takes_back:
                        raise JournalGone("a takeover takes back what was shown")
                    if shown:
                        yield _data(shown)
        yield _DONE

    async def _events_so_far(self) -> Sequence[Event]:
        user_id, database = self._identity.user_id, self._database
        if self._is_new:
            return ()
        if self._first_seq is not None:
            events = await events_so_far(database, user_id, self._conversation_id, self._turn_id, self._first_seq)
            if events is not None:
                return events
        turn = await stored_turn(database, user_id, self._conversation_id, self._turn_id)
        if turn.finished_at is None:
            raise JournalGone
        return events_of_stored(turn)


def _data(chunks: Sequence[str]) -> bytes:
    # JSON has no line break outside of its strings, and none unescaped inside.
    return "".join(f"data: {chunk}\n\n" for chunk in chunks).encode()
