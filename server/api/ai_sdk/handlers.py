"""The AI SDK's `DefaultChatTransport` over HTTP: questions and answers, what it loads a chat with, and tickets."""

from __future__ import annotations

from typing import Any, TypeAlias
from uuid import UUID

from starlette.types import ASGIApp, Receive, Scope, Send

from anynode.models.database import Database
from anynode.models.messages import read_messages
from anynode.models.turns import read_usage
from anynode.server.api.ai_sdk.bodies import ChatMessages, ChatMessagesQuery, Stopped, Ticket
from anynode.server.api.ai_sdk.messages import shown_messages
from anynode.server.api.ai_sdk.questions import ask, chat_of
from anynode.server.api.ai_sdk.stream import ChunkStream
from anynode.server.api.ai_sdk.wire import ChatRequest
from anynode.server.api.tickets import Tickets
from anynode.server.engine.node import Node
from anynode.server.errors import NotFound
from anynode.server.protocol.bodies import NoQuery
from anynode.server.settings import Settings
from anynode.server.transport.cut_short import CutShort, until
from anynode.server.transport.http import Call, Holding, reply
from anynode.server.transport.turn_end import end_of_turn

AnyCall: TypeAlias = Call[Any, Any]


class AiSdk:
    """What serves the operations of the AI SDK's clients; `holding` bounds those that wait or stream."""

    def __init__(self, settings: Settings, node: Node, database: Database, holding: Holding, tickets: Tickets) -> None:
        self._settings = settings
        self._node = node
        self._database = database
        self._holding = holding
        self._tickets = tickets

    async def send(self, call: Call[NoQuery, ChatRequest]) -> ASGIApp:
        """`POST /api/chat`."""
        with self._holding():
            admission = await ask(self._node, self._database, call.user_id, call.body)
        assert admission.turn_id is not None
        is_new = admission.outcome == "admitted"
        return self._stream(call, admission.conversation_id, admission.turn_id, admission.first_seq, is_new=is_new)

    async def resume(self, call: AnyCall) -> ASGIApp:
        """`GET /api/chat/{chat_id}/stream`."""
        chat = await chat_of(self._database, call.user_id, call.texts["chat_id"])
        if chat is None or chat.turn_id is None:
            return _nothing
        return self._stream(call, chat.conversation_id, chat.turn_id, chat.first_seq)

    async def stop(self, call: AnyCall) -> ASGIApp:
        """`POST /api/chat/{chat_id}/stop`."""
        chat = await chat_of(self._database, call.user_id, call.texts["chat_id"])
        if chat is None:
            raise NotFound("There is no such chat.")
        turn_id = await self._node.cancel(call.user_id, chat.conversation_id, None)
        if turn_id is not None and turn_id == chat.turn_id and chat.first_seq is not None:
            ending = end_of_turn(self._node, call.user_id, chat.conversation_id, turn_id, chat.first_seq)
            with self._holding():
                try:
                    await call.while_connected(until(ending, self._node.drained.wait()))
                except CutShort:
                    pass  # it has been asked for, and another node does it
        return reply(Stopped(chat.conversation_id, turn_id))

    async def messages(self, call: Call[ChatMessagesQuery, None]) -> ASGIApp:
        """`GET /api/chat/{chat_id}/messages`; one that nothing was sent to yet has none."""
        chat = await chat_of(self._database, call.user_id, call.texts["chat_id"])
        if chat is None:
            return reply(ChatMessages([], None))
        page = await read_messages(
            self._database,
            call.user_id,
            chat.conversation_id,
            limit=call.query.limit,
            before=call.query.before,
            with_superseded=False,
        )
        if page is None:
            raise NotFound("There is no such message in this chat.")
        turn_ids = {row["turn_id"] for row in page.messages if row["turn_id"] is not None}
        usage = await read_usage(self._database, turn_ids)
        messages, next_before = shown_messages(page, usage)
        return reply(ChatMessages(messages, next_before))

    async def ticket(self, call: AnyCall) -> ASGIApp:
        """`POST /auth/ticket`."""
        return reply(Ticket(*await self._tickets.issue(call.identity)), 201)

    def _stream(
        self, call: AnyCall, conversation_id: UUID, turn_id: UUID, first_seq: int | None, *, is_new: bool = False
    ) -> ASGIApp:
        stream = ChunkStream(
            self._node,
            self._database,
            call.identity,
            conversation_id,
            turn_id,
            first_seq,
            is_new=is_new,
            disconnected=call.disconnected,
            heartbeat_seconds=self._settings.heartbeat_seconds,
        )
        return self._holding.streaming(stream)


async def _nothing(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": [(b"cache-control", b"no-store")]})
    await send({"type": "http.response.body", "body": b""})
