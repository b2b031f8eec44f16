"""The connections of our own wire (PROTOCOL.md): conversations followed over `/ws`."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from typing import Any, Final, assert_never
from uuid import UUID

from anynode.models.conversations import Admission, Snapshot
from anynode.models.database import Unavailable
from anynode.server.errors import ClientError, CloseCode, DatabaseUnavailable, RateLimited, Unauthorized
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
from anynode.server.transport.connection import FOLLOWS_MAX, Closed, Connection

logger = logging.getLogger("anynode.websocket")

_HEARTBEAT: Final = encode(Heartbeat())


class NativeConnection(Connection):
    """One client's connection, in the frames of `protocol`."""

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
        assert self._identity is not None
        ready = Ready(self._identity.user_id, self._node.node_id, SUBPROTOCOL, self._settings.heartbeat_seconds)
        await self._send(encode(ready))

    async def _obey(self, text: str) -> None:
        frame = decode_frame(text)
        assert self._identity is not None
        node, user_id = self._node, self._identity.user_id
        match frame:
            case MessageSend():
                self._may_follow(frame.conversation_id)
                await self._follow_admitted(await node.send(user_id, frame))
            case ConversationFollow():
                self._may_follow(frame.conversation_id)
                await self._follow(frame.conversation_id, frame.after, request_id=frame.request_id)
            case ConversationUnfollow():
                await self._unfollow(frame.conversation_id)
            case TurnCancel():
                await node.cancel(user_id, frame.conversation_id, frame.turn_id)
            case TurnRegenerate():
                self._may_follow(frame.conversation_id)
                await self._follow_admitted(await node.regenerate(user_id, frame))
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

    def _warn_of_expiry(self, expires_at: float) -> None:
        self.send_soon(encode(AuthExpiring(expires_at)))

    def warn_of_drain(self, deadline: float) -> None:
        """Send the client elsewhere."""
        self.send_soon(encode(Goaway("restarting", deadline)))

    # Following.

    def _may_follow(self, conversation_id: UUID | None) -> None:
        if len(self._follows) >= FOLLOWS_MAX and conversation_id not in self._follows:
            raise RateLimited(f"A connection follows at most {FOLLOWS_MAX} conversations: unfollow one.")

    async def _follow_admitted(self, admission: Admission) -> None:
        if admission.outcome == "repeated" or admission.conversation_id not in self._follows:
            after = None if admission.first_seq is None else admission.first_seq - 1
            await self._follow(admission.conversation_id, after, is_own=True)

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
        assert self._identity is not None
        user_id, follows, shown_id = self._identity.user_id, self._node.follows, str(conversation_id)
        try:
            while True:
                try:
                    async with aclosing(follows.follow(user_id, conversation_id, after, is_own=is_own)) as steps:
                        async for step in steps:
                            if isinstance(step, Snapshot):
                                await self._send(snapshot_frame(conversation_id, step))
                                after = step.seq
                            else:
                                for frame in event_frames(shown_id, step):
                                    await self._send(frame)
                                after = step[-1].seq
                except Unavailable:
                    # Say so, and go on trying from where the client is.
                    error = DatabaseUnavailable(conversation_id=conversation_id)
                    await self._send(error_frame(error, request_id))
        except ClientError as error:
            await self._send(error_frame(error, request_id))
        except (OSError, Closed):
            pass  # the reader learns of it by itself
        except Exception:
            logger.exception("following conversation %s failed", conversation_id)
            self.close_soon(CloseCode.INTERNAL, "internal error")
        if self._follows.get(conversation_id) is asyncio.current_task():
            del self._follows[conversation_id]
