"""One WebSocket connection: its authentication, frames in and frames out. Each API says what its frames are.

A connection has one reader, which is the request's own task, and one task for each thing that it follows.
All of them send: a frame is written whole, and a socket that is not drained makes its senders wait, not queue.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar, Final, TypeVar

from starlette.types import Receive, Scope, Send

from anynode.server.auth import Authenticator, Identity, bearer_of, token_of_subprotocols
from anynode.server.engine.node import Node
from anynode.server.errors import ClientError, CloseCode, KeysUnavailable, RateLimited, Unauthorized
from anynode.server.limits import UserLimits
from anynode.server.settings import Settings
from anynode.server.transport.allowance import Allowance, NotSlowingDown, size_of
from anynode.server.transport.refusals import count_refusal
from anynode.server.transport.sessions import Session
from anynode.server.transport.shares import Shares

logger = logging.getLogger("anynode.websocket")

Decoded = TypeVar("Decoded")

AUTHENTICATED: Final = "anynode.authenticated"  # in the scope: a function to call once the client has authenticated

AUTHENTICATION_SECONDS: Final = 10.0
EXPIRING_SECONDS: Final = 60.0  # how long before its token's end a connection is warned
FOLLOWS_MAX: Final = 1000  # conversations, or turns, that one connection follows
_TIMER_SECONDS_MAX: Final = 86_400.0  # a timer further off than this is set again later
_TIMER_SECONDS_MIN: Final = 0.001  # a timer may ring this much early


def heartbeat_due_in(now: float, sent_at: float, interval_seconds: float) -> float:
    """Return in how many seconds a heartbeat is due, 0 for now: `interval_seconds` after the last frame was sent."""
    due_in = sent_at + interval_seconds - now
    return 0.0 if due_in <= _TIMER_SECONDS_MIN else due_in


def expiry_check_in(now: float, expires_at: float) -> tuple[float, bool]:
    """Return in how many seconds to look at a token that expires at a time (Unix seconds), and whether its client is
    to be warned then."""
    warn_in = expires_at - EXPIRING_SECONDS - now
    return (_TIMER_SECONDS_MAX, False) if warn_in > _TIMER_SECONDS_MAX else (max(warn_in, 0.0), True)


class Closed(Exception):
    """The connection is over. `code` is the close code to send, None where the peer has gone."""

    def __init__(self, code: int | None = None, reason: str = "") -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class Connection:
    """One client's connection. Where there is a `refusal` (close code and reason), the client is only told of it."""

    __slots__ = (
        "_allowance",
        "_authenticator",
        "_background",
        "_expiry_timer",
        "_heartbeat_timer",
        "_identity",
        "_is_closed",
        "_loop",
        "_node",
        "_receive",
        "_refusal",
        "_scope",
        "_send_asgi",
        "_sending",
        "_sent_at",
        "_session",
        "_settings",
        "_shares",
    )

    subprotocol: ClassVar[str]

    def __init__(
        self,
        settings: Settings,
        node: Node,
        authenticator: Authenticator,
        shares: Shares,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        refusal: tuple[int, str] | None,
    ) -> None:
        self._settings = settings
        self._node = node
        self._authenticator = authenticator
        self._shares = shares
        self._refusal = refusal
        self._scope = scope
        self._receive = receive
        self._send_asgi = send
        self._loop = asyncio.get_running_loop()
        self._identity: Identity | None = None
        self._session: Session | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._expiry_timer: asyncio.TimerHandle | None = None
        self._heartbeat_timer: asyncio.TimerHandle | None = None
        self._is_closed = False
        self._sending = 0
        self._sent_at = self._loop.time()
        self._allowance = Allowance(self._sent_at)

    @property
    def _user_id(self) -> str:
        """The user, once the client has authenticated."""
        assert self._identity is not None
        return self._identity.user_id

    @property
    def _limits(self) -> UserLimits:
        """The limits of the user, once the client has authenticated."""
        assert self._identity is not None
        return self._identity.limits

    # What each API does in its own way.

    def _token_in(self, text: str) -> str:
        """Return the token in the first frame of a client. Raises ClientError."""
        raise NotImplementedError

    async def _welcome(self) -> None:
        """Begin to serve a client that has authenticated."""

    async def _obey(self, text: str) -> None:
        """Do what a frame asks for. Raises ClientError."""
        raise NotImplementedError

    async def _refuse(self, error: ClientError, text: str) -> None:
        """Tell the client that a frame is refused."""
        raise NotImplementedError

    async def _turn_away(self, error: RateLimited) -> None:
        """Tell a client that has authenticated why it may not connect now, where the API has words for it."""

    def _warn_of_expiry(self, expires_at: float) -> None:
        """Tell the client that its token expires soon."""

    def warn_of_drain(self, deadline: float) -> None:
        """Tell the client that the node goes down."""

    async def run(self) -> None:
        """Serve the connection from its handshake to its end."""
        try:
            await self._accept()
            self._identity = await self._authenticate()
            await self._enter(self._identity)
            self._lift_first_bounds()
            self._watch_expiry()
            await self._welcome()
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
            if self._session is not None:
                self._session.close()
                self._session = None  # it holds a method of this connection

    # The handshake.

    async def _accept(self) -> None:
        await self._receive()  # websocket.connect
        offered = self._scope.get("subprotocols") or []
        chosen = self.subprotocol if self.subprotocol in offered else None
        # A refusal is accept-then-close: a browser cannot read the reason of a failed handshake.
        await self._send_asgi({"type": "websocket.accept", "subprotocol": chosen})
        if self._refusal is not None:
            raise Closed(*self._refusal)

    async def _authenticate(self) -> Identity:
        try:
            async with asyncio.timeout(AUTHENTICATION_SECONDS):
                return await self._identify()
        except TimeoutError:
            raise Closed(CloseCode.AUTHENTICATION_TIMEOUT, "no authentication in time") from None
        except Unauthorized as error:
            raise Closed(CloseCode.UNAUTHORIZED, error.message) from None
        except KeysUnavailable as error:
            raise Closed(CloseCode.OVERLOADED, error.message) from None

    async def _identify(self) -> Identity:
        token = bearer_of(self._scope["headers"]) or token_of_subprotocols(self._scope.get("subprotocols") or [])
        return await self._authenticator.authenticate(token or await self._first_token())

    async def _first_token(self) -> str:
        while True:
            text = await self._receive_text()
            try:
                self._take_allowance(text)
                return self._token_in(text)
            except ClientError as error:
                refused = error.with_traceback(None)  # or it would hold this frame, which holds it
            count_refusal(refused)
            await self._refuse(refused, text)  # out of the handler: what fails here is logged without the client's text

    def _lift_first_bounds(self) -> None:
        """Tell the server, if it has stricter bounds for clients that have not authenticated, to lift them."""
        lift: Callable[[], None] | None = self._scope.pop(AUTHENTICATED, None)
        if lift is not None:
            lift()

    async def _enter(self, identity: Identity) -> None:
        """Count the connection towards its user's from now on, and no more to those that have not authenticated."""
        try:
            self._session = self._shares.sessions.open(identity, self._end_revoked)
        except Unauthorized as error:  # it was revoked while a ticket was redeemed
            raise Closed(CloseCode.UNAUTHORIZED, error.message) from None
        except RateLimited as error:
            count_refusal(error)
            await self._turn_away(error)
            raise Closed(CloseCode.OVERLOADED, error.message) from None
        self._shares.unauthenticated.discard(self)

    def _end_revoked(self) -> None:
        self.close_soon(CloseCode.UNAUTHORIZED, "the token was revoked")

    def give_way(self) -> None:
        """Close the connection, which has not authenticated yet, in favour of a newer one."""
        self.close_soon(CloseCode.OVERLOADED, "too many sockets without a token; send it at once")

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
            self._take_allowance(text)
            await self._obey(text)
            return
        except ClientError as error:
            refused = error.with_traceback(None)
        count_refusal(refused)
        await self._refuse(refused, text)  # as above

    def _take_allowance(self, text: str) -> None:
        now = self._loop.time()
        try:
            self._allowance.take(now)
        except NotSlowingDown:
            raise Closed(CloseCode.LIMITS, "too many frames") from None
        if self._identity is not None:
            self._shares.frame_bytes.take(self._identity.user_id, now, size_of(text))

    async def _decode(self, decode: Callable[[str], Decoded], text: str) -> Decoded:
        """Return what `decode` makes of a frame. The next frame waits for it, and a long one for other users' turns."""
        return await self._shares.decoding.decode(self._user_id, text, decode)

    async def _renew(self, token: str) -> None:
        """Go on with a newer token of the same user. Raises Unauthorized."""
        assert self._identity is not None
        identity = await self._authenticator.authenticate(token)
        if identity.user_id != self._identity.user_id:
            raise Closed(CloseCode.FORBIDDEN, "a connection cannot become another user's")
        self._identity = identity
        if self._session is not None:
            self._session.identity = identity
        self._watch_expiry()

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

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    async def _end_tasks(self) -> None:
        for timer in (self._expiry_timer, self._heartbeat_timer):
            if timer is not None:
                timer.cancel()
        tasks = list(self._background)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._let_go()

    def _let_go(self) -> None:
        """Let go of what the connection had, and of what leads back to it: it has ended.

        A task that was cancelled keeps its traceback, which keeps the frames of its functions, which keep the
        connection: what all of them hold would wait for the garbage collector, which has little to do on a quiet node.
        """
        self._background.clear()

    # Signs of life.

    def _start_heartbeats(self, heartbeat: str) -> None:
        """Send this frame, from now on, whenever nothing else was sent for HEARTBEAT_SECONDS."""
        self._beat_later(heartbeat, self._settings.heartbeat_seconds)

    def _beat_later(self, heartbeat: str, seconds: float) -> None:
        self._heartbeat_timer = self._loop.call_later(seconds, self._beat, heartbeat)

    def _beat(self, heartbeat: str) -> None:
        interval = self._settings.heartbeat_seconds
        due_in = heartbeat_due_in(self._loop.time(), self._sent_at, interval)
        if not due_in:
            self.send_soon(heartbeat)
        self._beat_later(heartbeat, due_in or interval)

    # The token's end.

    def _watch_expiry(self) -> None:
        if self._expiry_timer is not None:
            self._expiry_timer.cancel()
        assert self._identity is not None
        check_in, is_warning = expiry_check_in(time.time(), self._identity.expires_at)
        self._expiry_timer = self._loop.call_later(check_in, self._expire if is_warning else self._watch_expiry)

    def _expire(self) -> None:
        assert self._identity is not None
        expires_at = self._identity.expires_at
        self._warn_of_expiry(expires_at)
        self._expiry_timer = self._loop.call_later(
            max(expires_at - time.time(), 0.0), self.close_soon, CloseCode.UNAUTHORIZED, "the token has expired"
        )
