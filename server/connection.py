"""One connection: its authentication, frames in, frames out.

A connection has one reader, which is the request's own task, and one task for each conversation that it follows.
All of them send: a frame is written whole, and a socket that is not drained makes its senders wait, not queue.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from contextlib import aclosing
from typing import Any, Final, assert_never
from uuid import UUID

from starlette.types import Receive, Scope, Send

from models.conversations import Admission, Snapshot
from models.database import Unavailable
from server.auth import Authenticator, Identity, bearer_of, token_of_subprotocols
from server.encoding import encode, error_frame, event_frames, snapshot_frame
from server.errors import (
    ClientError,
    CloseCode,
    DatabaseUnavailable,
    RateLimited,
    Unauthorized,
)
from server.node import Node
from server.protocol import (
    SUBPROTOCOL,
    AnyClientFrame,
    Auth,
    AuthExpiring,
    ConversationFollow,
    ConversationUnfollow,
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
from server.settings import Settings

logger = logging.getLogger("anynode.websocket")

AUTHENTICATION_SECONDS: Final = 10.0
EXPIRING_SECONDS: Final = 60.0  # how long before its token's end a connection is warned
FOLLOWS_MAX: Final = 1000  # conversations that one connection follows
FRAMES_BURST: Final = 500  # frames that may come at once …
FRAMES_PER_SECOND: Final = 100  # … and in the long run; more are refused,
REFUSALS_MAX: Final = 1000  # and who goes on all the same is disconnected
_HEARTBEAT: Final = encode(Heartbeat())
_TIMER_SECONDS_MAX: Final = 86_400.0  # a timer further off than this is set again later


class Closed(Exception):
    """The connection is over; `code` is ours to send, None when the peer has gone."""

    def __init__(self, code: int | None = None, reason: str = "") -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class Connection:
    """One client's connection; with a `refusal` (close code and reason) only to be told of it."""

    __slots__ = (
        "_allowance",
        "_allowed_at",
        "_authenticator",
        "_background",
        "_expiry_timer",
        "_follows",
        "_heartbeat_timer",
        "_identity",
        "_is_closed",
        "_loop",
        "_node",
        "_receive",
        "_refusal",
        "_refusals",
        "_scope",
        "_send_asgi",
        "_sending",
        "_sent_at",
        "_settings",
    )

    def __init__(
        self,
        settings: Settings,
        node: Node,
        authenticator: Authenticator,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        refusal: tuple[int, str] | None,
    ) -> None:
        self._settings = settings
        self._node = node
        self._authenticator = authenticator
        self._refusal = refusal
        self._scope = scope
        self._receive = receive
        self._send_asgi = send
        self._loop = asyncio.get_running_loop()
        self._identity: Identity | None = None
        self._follows: dict[UUID, asyncio.Task[None]] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._expiry_timer: asyncio.TimerHandle | None = None
        self._heartbeat_timer: asyncio.TimerHandle | None = None
        self._is_closed = False
        self._sending = 0
        self._sent_at = self._loop.time()
        self._allowance = float(FRAMES_BURST)
        self._allowed_at = self._sent_at
        self._refusals = 0

    async def run(self) -> None:
        """From the handshake to the end."""
        try:
            await self._accept()
            self._identity = await self._authenticate()
            await self._welcome()
            self._beat_later(self._settings.heartbeat_seconds)
            while True:
                await self._handle(await self._receive_text())
        except Closed as closed:
            if closed.code is not None:
                await self._close(closed.code, closed.reason)
        except OSError:
            pass  # the peer went away while something was sent
        except Exception:
            logger.exception("a connection failed")
            await self._close(CloseCode.INTERNAL, "internal error")
        finally:
            self._is_closed = True
            await self._end_tasks()

    # The handshake.

    async def _accept(self) -> None:
        await self._receive()  # websocket.connect
        offered = self._scope.get("subprotocols") or []
        chosen = SUBPROTOCOL if SUBPROTOCOL in offered else None
        # A refusal is accept-then-close: a browser cannot read the reason of a failed handshake.
        await self._send_asgi({"type": "websocket.accept", "subprotocol": chosen})
        if self._refusal is not None:
            raise Closed(*self._refusal)

    async def _authenticate(self) -> Identity:
        token = bearer_of(self._scope["headers"]) or token_of_subprotocols(self._scope.get("subprotocols") or [])
        try:
            async with asyncio.timeout(AUTHENTICATION_SECONDS):
                if token is None:
                    token = await self._first_token()
                return await self._authenticator.authenticate(token)
        except TimeoutError:
            raise Closed(CloseCode.AUTHENTICATION_TIMEOUT, "no authentication in time") from None
        except Unauthorized as error:
            raise Closed(CloseCode.UNAUTHORIZED, error.message) from None

    async def _first_token(self) -> str:
        while True:
            text = await self._receive_text()
            try:
                self._take_allowance()
                frame = decode_frame(text)
                if isinstance(frame, Auth):
                    return frame.token
                raise Unauthorized('the first frame must be {"type": "auth", "token": …}')
            except ClientError as error:
                await self._refuse(error, text)

    async def _welcome(self) -> None:
        assert self._identity is not None
        self._watch_expiry()
        ready = Ready(self._identity.user_id, self._node.node_id, SUBPROTOCOL, self._settings.heartbeat_seconds)
        await self._send(encode(ready))

    # What comes in.

    async def _receive_text(self) -> str:
        message = await self._receive()
        if message["type"] == "websocket.disconnect" or self._is_closed:
            raise Closed
        text: str | None = message.get("text")
        if text is None:
            raise Closed(CloseCode.BINARY, "frames are text")
        return text

    async def _handle(self, text: str) -> None:
        try:
            self._take_allowance()
            frame = decode_frame(text)
            await self._obey(frame)
        except ClientError as error:
            await self._refuse(error, text)

    async def _obey(self, frame: AnyClientFrame) -> None:
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
            case _:
                assert_never(frame)

    async def _renew(self, token: str) -> None:
        assert self._identity is not None
        identity = await self._authenticator.authenticate(token)
        if identity.user_id != self._identity.user_id:
            raise Closed(CloseCode.FORBIDDEN, "a connection cannot become another user's")
        self._identity = identity
        await self._welcome()

    def _take_allowance(self) -> None:
        now = self._loop.time()
        earned = (now - self._allowed_at) * FRAMES_PER_SECOND
        self._allowance = min(FRAMES_BURST, self._allowance + earned)
        self._allowed_at = now
        if self._allowance == FRAMES_BURST:
            self._refusals = 0
        if self._allowance >= 1:
            self._allowance -= 1
            return
        self._refusals += 1
        if self._refusals > REFUSALS_MAX:
            raise Closed(CloseCode.LIMITS, "too many frames")
        raise RateLimited(f"More than {FRAMES_PER_SECOND} frames a second.")

    async def _refuse(self, error: ClientError, text: str) -> None:
        await self._send(error_frame(error, request_id_of(text)))

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
        task = asyncio.create_task(self._show(conversation_id, after, is_own, request_id))
        self._follows[conversation_id] = task

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

    # What goes out.

    async def _send(self, text: str) -> None:
        if self._is_closed:
            raise Closed
        self._sending += 1
        try:
            await self._send_asgi({"type": "websocket.send", "text": text})
            self._sent_at = self._loop.time()
        finally:
            self._sending -= 1

    def send_soon(self, text: str) -> None:
        """Send a frame from outside of the connection's own tasks, unless the socket is blocked."""
        if self._identity is not None and not self._is_closed and self._sending == 0:
            self._spawn(self._send_quietly(text))

    def close_soon(self, code: int, reason: str) -> None:
        """Close the connection from outside of its reader."""
        if not self._is_closed:
            self._spawn(self._close(code, reason))

    async def _send_quietly(self, text: str) -> None:
        try:
            await self._send(text)
        except (OSError, Closed):
            pass

    async def _close(self, code: int, reason: str) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        try:
            await self._send_asgi({"type": "websocket.close", "code": code, "reason": reason})
        except OSError:
            pass

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _end_tasks(self) -> None:
        for timer in (self._heartbeat_timer, self._expiry_timer):
            if timer is not None:
                timer.cancel()
        tasks = [*self._follows.values(), *self._background]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    # Timers.

    def _beat_later(self, seconds: float) -> None:
        self._heartbeat_timer = self._loop.call_later(seconds, self._beat)

    def _beat(self) -> None:
        interval = self._settings.heartbeat_seconds
        due_in = self._sent_at + interval - self._loop.time()
        if due_in <= 0.001:
            self.send_soon(_HEARTBEAT)
            due_in = interval
        self._beat_later(due_in)

    def _watch_expiry(self) -> None:
        if self._expiry_timer is not None:
            self._expiry_timer.cancel()
        assert self._identity is not None
        warn_in = self._identity.expires_at - EXPIRING_SECONDS - time.time()
        if warn_in > _TIMER_SECONDS_MAX:
            self._expiry_timer = self._loop.call_later(_TIMER_SECONDS_MAX, self._watch_expiry)
        else:
            self._expiry_timer = self._loop.call_later(max(warn_in, 0.0), self._warn_of_expiry)

    def _warn_of_expiry(self) -> None:
        assert self._identity is not None
        expires_at = self._identity.expires_at
        self.send_soon(encode(AuthExpiring(expires_at)))
        self._expiry_timer = self._loop.call_later(
            max(expires_at - time.time(), 0.0), self.close_soon, CloseCode.UNAUTHORIZED, "the token has expired"
        )
