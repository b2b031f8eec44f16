"""The connections of the AI SDK's `WebSocketChatTransport`: turns that are shown by request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from functools import partial
from typing import Any, Final
from urllib.parse import parse_qs
from uuid import UUID

from anynode.models.database import Database, Unavailable
from anynode.models.events import Event
from anynode.server.api.ai_sdk.fold import Chunks
from anynode.server.api.ai_sdk.newer import end_of_chat, something_newer
from anynode.server.api.ai_sdk.questions import ask, chat_of
from anynode.server.api.ai_sdk.wire import (
    SUBPROTOCOL,
    AbortFrame,
    ResumeFrame,
    SendFrame,
    chunk_head,
    decode_frame,
    end_frame,
    error_frame,
    heartbeat_frame,
    no_active_frame,
    ready_frame,
    start_frame,
    token_in,
)
from anynode.server.api.tickets import Tickets
from anynode.server.auth import Identity
from anynode.server.errors import ClientError, CloseCode, DatabaseUnavailable, InvalidFrame, RateLimited, Unauthorized
from anynode.server.protocol.frames import request_id_of
from anynode.server.transport.connection import FOLLOWS_MAX, Closed, Connection
from anynode.server.transport.turn_end import stored_turn
from anynode.server.transport.turn_events import JournalGone, events_of_stored, events_of_turn

logger = logging.getLogger("anynode.websocket")

# A client that resumes while it is resumed aborts the one for the other. That is no stop: so much later it would be.
STOP_SECONDS: Final = 0.25


class _Request:
    """A request that is under way in a chat."""

    __slots__ = ("chat_id", "conversation_id", "task")

    def __init__(self, chat_id: str, conversation_id: UUID) -> None:
        self.chat_id = chat_id
        self.conversation_id = conversation_id
        self.task: asyncio.Task[None] | None = None


class _Shown(_Request):
    """One that shows a turn."""

    __slots__ = ("first_seq", "is_resumed", "turn_id")

    def __init__(
        self, chat_id: str, conversation_id: UUID, turn_id: UUID, first_seq: int | None, *, is_resumed: bool
    ) -> None:
        super().__init__(chat_id, conversation_id)
        self.turn_id = turn_id
        self.first_seq = first_seq
        self.is_resumed = is_resumed


class AiSdkConnection(Connection):
    """One client's connection, in the frames of the transport."""

    __slots__ = ("_asking", "_database", "_requests", "_stopped", "_stopping", "_tickets", "_token", "_unheard")

    subprotocol = SUBPROTOCOL

    def __init__(self, *arguments: Any, database: Database, tickets: Tickets, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._database = database
        self._tickets = tickets
        self._requests: dict[str, _Request] = {}  # by requestId
        self._asking: dict[str, bool] = {}  # by requestId: sends that may wait, and whether they were aborted
        self._stopping: dict[str, tuple[asyncio.TimerHandle, _Shown]] = {}  # by the chat's id: turns soon to be stopped
        self._stopped: dict[str, UUID] = {}  # by the chat's id: turns that were stopped, and may still run
        self._token: str | None = None  # the last one that came in a frame
        self._unheard: str | None = None  # a frame that authenticated the connection, and asks for something too

    # The handshake.

    async def _identify(self) -> Identity:
        ticket = self._parameter("ticket")
        try:
            if ticket is not None:
                return await self._tickets.redeem(ticket)
            return await super()._identify()
        except Unavailable:
            raise Closed(CloseCode.OVERLOADED, DatabaseUnavailable().message) from None
        except Unauthorized as error:
            if self._unheard is not None:
                await self._refuse(error, self._unheard)
            raise

    def _token_in(self, text: str) -> str:
        frame = decode_frame(text)
        token = None if isinstance(frame, AbortFrame) else token_in(frame.headers)
        if token is None:
            raise Unauthorized("There is no token: in the handshake, a ticket, or the headers of the first frame.")
        self._token, self._unheard = token, text
        return token

    async def _welcome(self) -> None:
        if self._parameter("heartbeats") == "true":
            await self._send(ready_frame(self._node.node_id, self._settings.heartbeat_seconds))
            self._start_heartbeats(heartbeat_frame())
        if self._unheard is not None:
            unheard, self._unheard = self._unheard, None
            await self._handle(unheard)

    def _parameter(self, name: str) -> str | None:
        """The last one of this name in the URL."""
        values = parse_qs(self._scope["query_string"].decode("latin-1")).get(name)
        return values[-1] if values else None

    # What comes in.

    async def _obey(self, text: str) -> None:
        frame = decode_frame(text)
        match frame:
            case SendFrame():
                await self._renew_by(frame.headers)
                await self._send_message(frame)
            case ResumeFrame():
                await self._renew_by(frame.headers)
                if frame.wait_after is None:
                    await self._resume(frame)
                else:
                    await self._wait(frame, frame.wait_after)
            case AbortFrame():
                await self._abort(frame.request_id)

    async def _renew_by(self, headers: Mapping[str, str]) -> None:
        token = token_in(headers)
        if token is not None and token != self._token:
            await self._renew(token)
            self._token = token

    async def _refuse(self, error: ClientError, text: str) -> None:
        request_id = request_id_of(text, "requestId")
        if request_id is None:  # there is nothing in this wire to say it with
            raise Closed(CloseCode.LIMITS, error.message.encode()[:120].decode(errors="ignore"))
        await self._send(error_frame(request_id, error.message))

    async def _send_message(self, frame: SendFrame) -> None:
        self._may_show()
        await self._stop_now(frame.id)
        stopped = self._stopped.get(frame.id)
        if stopped is None and frame.if_busy == "reject":
            await self._ask(frame, None)
        else:  # it may have to wait for a turn to end, which other chats must not
            self._asking[frame.request_id] = False
            self._spawn(self._ask_apart(frame, stopped))

    async def _ask(self, frame: SendFrame, stopped: UUID | None) -> None:
        # To the end, whoever goes: what is admitted is to be answered at once.
        asking = asyncio.ensure_future(ask(self._node, self._database, self._user_id, frame, stopped=stopped))
        asking.add_done_callback(lambda done: done.cancelled() or done.exception())
        admission = await asyncio.shield(asking)
        if self._stopped.get(frame.id) == stopped:
            self._stopped.pop(frame.id, None)
        assert admission.turn_id is not None
        shown = _Shown(frame.id, admission.conversation_id, admission.turn_id, admission.first_seq, is_resumed=False)
        if self._asking.get(frame.request_id):
            await self._stop(shown)
        else:
            self._begin(frame.request_id, shown, partial(self._show, frame.request_id, shown, -1))

    async def _ask_apart(self, frame: SendFrame, stopped: UUID | None) -> None:
        try:
            await self._ask(frame, stopped)
        except ClientError as error:
            await self._send_quietly(error_frame(frame.request_id, error.message))
        except Exception:
            logger.exception("a message could not be sent")
            self.close_soon(CloseCode.INTERNAL, "internal error")
        finally:
            self._asking.pop(frame.request_id, None)

    async def _resume(self, frame: ResumeFrame) -> None:
        self._may_show()
        if (stopping := self._stopping.pop(frame.id, None)) is not None:
            stopping[0].cancel()
        chat = await chat_of(self._database, self._user_id, frame.id)
        if chat is None or chat.turn_id is None:
            await self._send(no_active_frame(frame.request_id))
            return
        after = -1 if frame.last_sequence is None else frame.last_sequence
        if chat.first_seq is None and after >= 0:
            raise InvalidFrame("The answer is too old to go on with: resume without lastSequence.")
        await self._send(start_frame(frame.request_id))
        shown = _Shown(frame.id, chat.conversation_id, chat.turn_id, chat.first_seq, is_resumed=True)
        self._begin(frame.request_id, shown, partial(self._show, frame.request_id, shown, after))

    async def _wait(self, frame: ResumeFrame, last_id: str) -> None:
        self._may_show()
        await self._stop_now(frame.id)  # else it would be resumed again when it is told of
        end = await end_of_chat(self._database, self._user_id, frame.id)
        if end is None:
            await self._send(no_active_frame(frame.request_id))
            return
        request = _Request(frame.id, end.conversation_id)
        last_seq = None if end.is_running or end.last_id != last_id else end.last_seq
        self._begin(frame.request_id, request, partial(self._await_newer, frame.request_id, request, last_seq))

    def _may_show(self) -> None:
        if len(self._requests) + len(self._asking) >= FOLLOWS_MAX:
            raise RateLimited(f"A connection shows at most {FOLLOWS_MAX} turns at once.")

    @property
    def _user_id(self) -> str:
        assert self._identity is not None
        return self._identity.user_id

    # Stopping.

    async def _abort(self, request_id: str) -> None:
        if request_id in self._asking:
            self._asking[request_id] = True
        shown = self._requests.pop(request_id, None)
        if shown is None:
            return  # it is over, or yet to come
        assert shown.task is not None
        shown.task.cancel()
        if not isinstance(shown, _Shown):
            return  # nothing has begun
        if not shown.is_resumed:
            await self._stop(shown)
            return
        stopping = self._stopping.get(shown.chat_id)
        if stopping is not None and stopping[1].turn_id != shown.turn_id:
            await self._stop_now(shown.chat_id)
        elif stopping is not None:
            stopping[0].cancel()
        timer = self._loop.call_later(STOP_SECONDS, self._stop_soon, shown.chat_id)
        self._stopping[shown.chat_id] = (timer, shown)

    def _stop_soon(self, chat_id: str) -> None:
        self._spawn(self._stop_now(chat_id))

    async def _stop_now(self, chat_id: str) -> None:
        if (stopping := self._stopping.pop(chat_id, None)) is not None:
            stopping[0].cancel()
            await self._stop(stopping[1])

    async def _stop(self, shown: _Shown) -> None:
        if len(self._stopped) >= FOLLOWS_MAX:  # of chats that nothing was sent to since
            self._stopped.clear()
        self._stopped[shown.chat_id] = shown.turn_id
        try:
            await self._node.cancel(self._user_id, shown.conversation_id, shown.turn_id)
        except ClientError as error:  # nobody hears of it: the client has forgotten the request
            logger.warning("turn %s could not be stopped: %s", shown.turn_id, error)

    async def _end_tasks(self) -> None:
        for chat_id in list(self._stopping):  # whoever stops and goes has stopped
            await self._stop_now(chat_id)
        await super()._end_tasks()

    # What goes out.

    def _begin(self, request_id: str, request: _Request, answer: Callable[[], Awaitable[None]]) -> None:
        if (earlier := self._requests.get(request_id)) is not None and earlier.task is not None:
            earlier.task.cancel()
        self._requests[request_id] = request
        request.task = self._spawn(self._answer(request_id, request, answer))

    async def _answer(self, request_id: str, request: _Request, answer: Callable[[], Awaitable[None]]) -> None:
        try:
            await answer()
            self._forget(request_id, request)  # before the client can use the id again
            await self._send(end_frame(request_id))
        except ClientError as error:
            self._forget(request_id, request)
            await self._send_quietly(error_frame(request_id, error.message))
        except (OSError, Closed):
            pass  # the reader learns of it by itself
        except JournalGone:
            self.close_soon(CloseCode.RESTARTING, "the answer begins again")
        except Exception:
            logger.exception("a request in conversation %s could not be answered", request.conversation_id)
            self.close_soon(CloseCode.INTERNAL, "internal error")
        finally:
            self._forget(request_id, request)

    def _forget(self, request_id: str, request: _Request) -> None:
        if self._requests.get(request_id) is request:
            del self._requests[request_id]

    async def _show(self, request_id: str, shown: _Shown, after: int) -> None:
        head, sequence = chunk_head(request_id), -1
        async with aclosing(self._chunks(shown, is_whole=after < 0)) as chunks:
            async for chunk in chunks:
                sequence += 1
                if sequence > after:
                    await self._send(f'{head}{sequence},"chunk":{chunk}}}')

    async def _await_newer(self, request_id: str, request: _Request, last_seq: int | None) -> None:
        """From a cursor on; None: it is there already."""
        if last_seq is not None:
            await something_newer(self._node.follows, self._user_id, request.conversation_id, last_seq)
        await self._send(start_frame(request_id))

    async def _chunks(self, shown: _Shown, *, is_whole: bool) -> AsyncGenerator[str, None]:
        chunks = Chunks(str(shown.turn_id))
        if shown.first_seq is None:
            for event in await self._stored_events(shown):
                for chunk in chunks.take(event):
                    yield chunk
            return
        events = events_of_turn(
            self._node.follows, self._user_id, shown.conversation_id, shown.turn_id, shown.first_seq
        )
        has_begun = False
        try:
            async with aclosing(events) as batches:
                async for batch in batches:
                    has_begun = True
                    for event in batch:
                        for chunk in chunks.take(event):
                            yield chunk
        except JournalGone:
            if has_begun or not is_whole:  # what is stored makes other chunks
                raise
            for event in await self._stored_events(shown):
                for chunk in chunks.take(event):
                    yield chunk

    async def _stored_events(self, shown: _Shown) -> list[Event]:
        try:
            turn = await stored_turn(self._database, self._user_id, shown.conversation_id, shown.turn_id)
        except Unavailable as error:
            raise DatabaseUnavailable from error
        if turn.finished_at is None:
            raise JournalGone
        return events_of_stored(turn)
