"""Anynode's own wire (PROTOCOL.md): conversations followed over `/ws`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, Final, assert_never
from uuid import UUID

from anynode.models.events import Event
from anynode.server.engine.admission import Admitted
from anynode.server.engine.conversations import Snapshot
from anynode.server.errors import ClientError, CloseCode, DatabaseUnavailable, InternalError, RateLimited, Unauthorized
from anynode.server.protocol.encoding import encode, error_frame, event_frames, snapshot_frame
from anynode.server.protocol.frames import (
    SUBPROTOCOL,
    Auth,
    AuthExpiring,
    ConversationFollow,
    ConversationUnfollow,
    Goaway,
    Heartbeat,
    MessageSend,
    Ping,
    Pong,
    Ready,
    TurnCancel,
    TurnRegenerate,
    decode_frame,
    request_id_of,
)
from anynode.server.transport.connection import FOLLOWS_MAX, Connection
from anynode.server.transport.failures import show_to_end
from anynode.server.transport.long_frames import encode_update

logger = logging.getLogger("anynode.websocket")

_HEARTBEAT: Final = encode(Heartbeat())


class AnynodeConnection(Connection):
    """One client's connection in the frames of `anynode.v1`."""

    __slots__ = ("_follows",)

    subprotocol = SUBPROTOCOL

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._follows: dict[UUID, asyncio.Task[None]] = {}

    def _token_in(self, text: str) -> str:
        frame = decode_frame(text)
        if isinstance(frame, Auth):
            return frame.token
        raise Unauthorized('the first frame must be {"type": "auth", "token": …}')

    async def _welcome(self) -> None:
        await self._say_ready()
        self._start_heartbeats(_HEARTBEAT)

    async def _say_ready(self) -> None:
        ready = Ready(self._user_id, self._node.node_id, SUBPROTOCOL, self._settings.heartbeat_seconds)
        await self._send(encode(ready))

    async def _obey(self, text: str) -> None:
        frame = await self._decode(decode_frame, text)
        node, user_id = self._node, self._user_id
        match frame:
            case MessageSend():
                self._may_follow(frame.conversation_id)
                await self._follow_admitted(await node.send(user_id, frame, limits=self._limits))
            case ConversationFollow():
                self._may_follow(frame.conversation_id)
                await self._follow(frame.conversation_id, frame.after, request_id=frame.request_id)
            case ConversationUnfollow():
                await self._unfollow(frame.conversation_id)
            case TurnCancel():
                await node.cancel(user_id, frame.conversation_id, frame.turn_id)
            case TurnRegenerate():
                self._may_follow(frame.conversation_id)
                await self._follow_admitted(await node.regenerate(user_id, frame, limits=self._limits))
            case Ping():
                pong = Pong() if frame.request_id is None else Pong(frame.request_id)
                await self._send(encode(pong))
            case Auth():
                await self._renew(frame.token)
                await self._say_ready()
            case _:
                assert_never(frame)

    async def _refuse(self, error: ClientError, text: str) -> None:
        await self._send(error_frame(error, request_id_of(text)))

    async def _turn_away(self, error: RateLimited) -> None:
        await self._send(error_frame(error, None))

    def _warn_of_expiry(self, expires_at: float) -> None:
        self.send_soon(encode(AuthExpiring(expires_at)))

    def warn_of_drain(self, deadline: float) -> None:
        """Send the client elsewhere."""
        self.send_soon(encode(Goaway("restarting", deadline)))

    # Following.

    def _may_follow(self, conversation_id: UUID | None) -> None:
        if len(self._follows) >= FOLLOWS_MAX and conversation_id not in self._follows:
            raise RateLimited(
                f"A connection follows at most {FOLLOWS_MAX} conversations: unfollow one.",
                limit="follows_per_connection_max",
                limit_max=FOLLOWS_MAX,
            )

    async def _follow_admitted(self, admitted: Admitted) -> None:
        turn = admitted.turn
        if not admitted.is_new or turn.conversation_id not in self._follows:
            after = None if turn.first_seq is None else turn.first_seq - 1
            await self._follow(turn.conversation_id, after, is_own=True)

    async def _follow(
        self, conversation_id: UUID, after: int | None, *, is_own: bool = False, request_id: str | None = None
    ) -> None:
        await self._unfollow(conversation_id)
        self._follows[conversation_id] = self._spawn(self._show(conversation_id, after, is_own, request_id))

    async def _unfollow(self, conversation_id: UUID) -> None:
        task = self._follows.pop(conversation_id, None)
        if task is not None:
            task.cancel()
            await asyncio.wait((task,))

    async def _show(self, conversation_id: UUID, after: int | None, is_own: bool, request_id: str | None) -> None:
        showing = self._send_updates(conversation_id, after, is_own, request_id)
        await show_to_end(showing, partial(self._say_last_words, request_id), logger, f"conversation {conversation_id}")
        if self._follows.get(conversation_id) is asyncio.current_task():
            del self._follows[conversation_id]

    async def _send_updates(
        self, conversation_id: UUID, after: int | None, is_own: bool, request_id: str | None
    ) -> None:
        following = self._node.follows.keep_following(self._user_id, conversation_id, after, is_own=is_own)
        async with aclosing(following) as updates:
            async for update in updates:
                if isinstance(update, DatabaseUnavailable):
                    frames = [error_frame(update, request_id)]
                else:
                    frames = await encode_update(update, _frames, conversation_id)
                del update  # a follower that waits keeps nothing of what it was shown
                for frame in frames:
                    await self._send(frame)
                del frames, frame

    def _let_go(self) -> None:
        super()._let_go()
        self._follows.clear()

    async def _say_last_words(self, request_id: str | None, error: ClientError) -> None:
        if isinstance(error, InternalError):
            self.close_soon(CloseCode.INTERNAL, "internal error")
        else:
            await self._send(error_frame(error, request_id))


def _frames(conversation_id: UUID, update: Snapshot | Sequence[Event]) -> list[str]:
    if isinstance(update, Snapshot):
        return [snapshot_frame(conversation_id, update)]
    return event_frames(conversation_id, update)
