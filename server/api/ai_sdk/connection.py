"""The WebSocket connections of the AI SDK's `WebSocketChatTransport`, which shows a turn for each request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias
from urllib.parse import parse_qs
from uuid import UUID

from anynode.models.events import Event
from anynode.server.api.ai_sdk.fold import Chunks
from anynode.server.api.ai_sdk.questions import ask
from anynode.server.api.ai_sdk.stops import Stops
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
from anynode.server.engine.turn_reader import TurnInterrupted, TurnRef
from anynode.server.errors import (
    ClientError,
    CloseCode,
    DatabaseUnavailable,
    InternalError,
    InvalidFrame,
    RateLimited,
    Unauthorized,
)
from anynode.server.protocol.frames import request_id_of
from anynode.server.transport.connection import FOLLOWS_MAX, Closed, Connection
from anynode.server.transport.failures import show_to_end

logger = logging.getLogger("anynode.websocket")


@dataclass(slots=True)
class _Request:
    """A request that is being answered in a chat: with its `turn`, or by waiting for something newer."""

    chat_id: str
    turn: TurnRef | None = None
    is_resumed: bool = False
    task: asyncio.Task[None] | None = None


_Answer: TypeAlias = Callable[[], Awaitable[None]]


class AiSdkConnection(Connection):
    """One client's connection in the frames of the AI SDK's transport."""

    __slots__ = ("_requests", "_stop_timer", "_stops", "_tickets", "_token", "_unheard")

    subprotocol = SUBPROTOCOL

    def __init__(self, *arguments: Any, tickets: Tickets, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._tickets = tickets
        self._requests: dict[str, _Request] = {}  # by requestId
        self._stops = Stops(remembered_max=FOLLOWS_MAX)
        self._stop_timer: asyncio.TimerHandle | None = None
        self._token: str | None = None  # the last one that came in a frame
        self._unheard: str | None = None  # a frame that authenticated the connection, and asks for something too

    # The handshake.

    async def _identify(self) -> Identity:
        ticket = self._parameter("ticket")
        try:
            if ticket is not None:
                return await self._tickets.redeem(ticket)
            return await super()._identify()
        except DatabaseUnavailable as error:
            raise Closed(CloseCode.OVERLOADED, error.message) from None
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
        """Return the last parameter of this name in the URL."""
        values = parse_qs(self._scope["query_string"].decode("latin-1")).get(name)
        return values[-1] if values else None

    # What comes in.

    async def _obey(self, text: str) -> None:
        frame = await self._decode(decode_frame, text)
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

    async def _turn_away(self, error: RateLimited) -> None:
        if self._unheard is not None:
            await self._refuse(error, self._unheard)

    async def _send_message(self, frame: SendFrame) -> None:
        self._may_show()
        await self._stop(self._stops.settle(frame.id))
        stopped = self._stops.stopped_in(frame.id)
        if stopped is None and frame.if_busy == "reject":
            await self._ask(frame, None)
        else:  # it may have to wait for a turn to end, which other chats must not
            self._stops.ask(frame.request_id)
            self._spawn(self._ask_apart(frame, stopped))

    async def _ask(self, frame: SendFrame, wait_for: TurnRef | None) -> None:
        # It is asked to the end even if the client goes: what is admitted is to be answered at once.
        asking = asyncio.ensure_future(ask(self._node, self._user_id, self._limits, frame, wait_for=wait_for))
        asking.add_done_callback(lambda done: done.cancelled() or done.exception())
        turn = (await asyncio.shield(asking)).turn
        stopped = self._stops.admit(frame.request_id, frame.id, turn, wait_for)
        if stopped is not None:
            await self._stop(stopped)
        else:
            self._begin(frame.request_id, _Request(frame.id, turn), partial(self._show, frame.request_id, turn, -1))

    async def _ask_apart(self, frame: SendFrame, wait_for: TurnRef | None) -> None:
        try:
            await show_to_end(
                self._ask(frame, wait_for), partial(self._say_last_words, frame.request_id), logger, "a question"
            )
        finally:
            self._stops.end_asking(frame.request_id)

    async def _resume(self, frame: ResumeFrame) -> None:
        self._may_show()
        self._stops.resume(frame.id)
        chat = await self._node.conversations.find_chat(self._user_id, frame.id)
        if chat is None or chat.turn is None:
            await self._send(no_active_frame(frame.request_id))
            return
        after = -1 if frame.last_sequence is None else frame.last_sequence
        if chat.turn.first_seq is None and after >= 0:
            raise InvalidFrame("The answer is too old to go on with: resume without lastSequence.")
        await self._send(start_frame(frame.request_id))
        request = _Request(frame.id, chat.turn, is_resumed=True)
        self._begin(frame.request_id, request, partial(self._show, frame.request_id, chat.turn, after))

    async def _wait(self, frame: ResumeFrame, last_id: str) -> None:
        self._may_show()
        await self._stop(self._stops.settle(frame.id))  # else the turn would be resumed again when it is told of
        end = await self._node.conversations.find_chat_end(self._user_id, frame.id)
        if end is None:
            await self._send(no_active_frame(frame.request_id))
            return
        last_seq = None if end.is_running or end.last_id != last_id else end.last_seq
        waiting = partial(self._await_newer, frame.request_id, end.conversation_id, last_seq)
        self._begin(frame.request_id, _Request(frame.id), waiting)

    def _may_show(self) -> None:
        if len(self._requests) + self._stops.asking >= FOLLOWS_MAX:
            raise RateLimited(
                f"A connection shows at most {FOLLOWS_MAX} turns at once.",
                limit="follows_per_connection_max",
                limit_max=FOLLOWS_MAX,
            )

    # Stopping.

    async def _abort(self, request_id: str) -> None:
        self._stops.abort_asking(request_id)
        request = self._requests.pop(request_id, None)
        if request is None:
            return  # it is over, or yet to come
        assert request.task is not None
        request.task.cancel()
        if request.turn is not None:
            await self._stop(
                self._stops.abort(request.chat_id, request.turn, self._loop.time(), is_resumed=request.is_resumed)
            )
            self._set_stop_timer()

    def _set_stop_timer(self) -> None:
        if self._stop_timer is not None:
            self._stop_timer.cancel()
        next_at = self._stops.next_at
        self._stop_timer = None if next_at is None else self._loop.call_at(next_at, self._stop_due)

    def _stop_due(self) -> None:
        self._spawn(self._stop(*self._stops.due(self._loop.time())))
        self._set_stop_timer()

    async def _stop(self, *turns: TurnRef | None) -> None:
        for turn in turns:
            if turn is None:
                continue
            try:
                await self._node.cancel(self._user_id, turn.conversation_id, turn.turn_id)
            except ClientError as error:  # nobody hears of it: the client has forgotten the request
                logger.warning("turn %s could not be stopped: %s", turn.turn_id, error)

    async def _end_tasks(self) -> None:
        if self._stop_timer is not None:
            self._stop_timer.cancel()
        await self._stop(*self._stops.end())  # a client that stops and goes has stopped
        await super()._end_tasks()
        self._requests.clear()
        self._stop_timer = None

    # What goes out.

    def _begin(self, request_id: str, request: _Request, answer: _Answer) -> None:
        if (earlier := self._requests.get(request_id)) is not None and earlier.task is not None:
            earlier.task.cancel()
        self._requests[request_id] = request
        request.task = self._spawn(self._answer(request_id, request, answer))

    async def _answer(self, request_id: str, request: _Request, answer: _Answer) -> None:
        async def answer_to_end() -> None:
            await answer()
            self._forget(request_id, request)  # before the client can use the id again
            await self._send(end_frame(request_id))

        async def say_last_words(error: ClientError) -> None:
            self._forget(request_id, request)
            await self._say_last_words(request_id, error)

        try:
            await show_to_end(answer_to_end(), say_last_words, logger, f"chat {request.chat_id!r}")
        finally:
            self._forget(request_id, request)

    async def _say_last_words(self, request_id: str, error: ClientError) -> None:
        match error:
            case TurnInterrupted():
                self.close_soon(CloseCode.RESTARTING, "the answer begins again")
            case InternalError():
                self.close_soon(CloseCode.INTERNAL, "internal error")
            case _:
                await self._send(error_frame(request_id, error.message))

    def _forget(self, request_id: str, request: _Request) -> None:
        if self._requests.get(request_id) is request:
            del self._requests[request_id]

    async def _show(self, request_id: str, turn: TurnRef, after: int) -> None:
        """Show the chunks of a turn that come after a sequence number."""
        chunks, head, sequence = Chunks(str(turn.turn_id)), chunk_head(request_id), -1
        async with aclosing(self._node.turns.events(turn, is_whole=after < 0)) as batches:
            async for events in batches:
                sequence = await self._send_chunks(chunks, events, head, sequence, after)
                del events  # while the turn is silent, nothing is kept of what was shown

    async def _send_chunks(self, chunks: Chunks, events: Sequence[Event], head: str, sequence: int, after: int) -> int:
        """Send those chunks of events that come after the number `after`. Returns the last number, of which the one
        before these is `sequence`."""
        for event in events:
            for chunk in chunks.take(event):
                sequence += 1
                if sequence > after:
                    await self._send(f'{head}{sequence},"chunk":{chunk}}}')
        return sequence

    async def _await_newer(self, request_id: str, conversation_id: UUID, last_seq: int | None) -> None:
        """Wait for something newer than a cursor in a chat in which no turn ran then (None: it is there already)."""
        if last_seq is not None:
            following = self._node.follows.keep_following(self._user_id, conversation_id, last_seq, is_own=True)
            async with aclosing(following) as updates:
                async for update in updates:
                    # The next event, of any type, is a message's or begins a turn. A snapshot is news too: the journal
                    # has lost what the client shows.
                    if not isinstance(update, DatabaseUnavailable):
                        break
        await self._send(start_frame(request_id))
