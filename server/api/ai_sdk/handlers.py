"""The AI SDK's `DefaultChatTransport` over HTTP: questions and answers, a chat's messages, and tickets."""

from __future__ import annotations

from starlette.types import ASGIApp

from anynode.server.api.ai_sdk.bodies import ChatMessages, ChatMessagesQuery, Stopped, Ticket
from anynode.server.api.ai_sdk.messages import shown_messages
from anynode.server.api.ai_sdk.questions import ask
from anynode.server.api.ai_sdk.stream import chunk_stream
from anynode.server.api.ai_sdk.wire import ChatRequest
from anynode.server.api.tickets import Tickets
from anynode.server.engine.conversations import Chat
from anynode.server.engine.node import Node
from anynode.server.engine.turn_reader import TurnRef
from anynode.server.errors import NotFound
from anynode.server.protocol.bodies import NoQuery
from anynode.server.settings import Settings
from anynode.server.transport.http import AnyApiRequest, ApiRequest, no_content, reply
from anynode.server.transport.sessions import Sessions
from anynode.server.transport.turn_end import wait_stopped


class AiSdk:
    """Serves the operations of the AI SDK's clients; `sessions` counts the requests that wait or stream."""

    def __init__(self, settings: Settings, node: Node, sessions: Sessions, tickets: Tickets) -> None:
        self._settings = settings
        self._node = node
        self._sessions = sessions
        self._tickets = tickets

    async def send(self, request: ApiRequest[NoQuery, ChatRequest]) -> ASGIApp:
        """`POST /api/chat`."""
        with self._sessions.waiting(request):
            admitted = await ask(self._node, request.user_id, request.identity.limits, request.body)
        return self._stream(request, admitted.turn, is_new=admitted.is_new)

    async def resume(self, request: AnyApiRequest) -> ASGIApp:
        """`GET /api/chat/{chat_id}/stream`."""
        chat = await self._find_chat(request)
        if chat is None or chat.turn is None:
            return no_content
        return self._stream(request, chat.turn, is_new=False)

    async def stop(self, request: AnyApiRequest) -> ASGIApp:
        """`POST /api/chat/{chat_id}/stop`."""
        chat = await self._find_chat(request)
        if chat is None:
            raise NotFound("There is no such chat.")
        turn_id = await self._node.cancel(request.user_id, chat.conversation_id, None)
        if chat.turn is not None and turn_id == chat.turn.turn_id:
            with self._sessions.waiting(request):
                await request.while_connected(wait_stopped(self._node, chat.turn))
        return reply(Stopped(chat.conversation_id, turn_id))

    async def messages(self, request: ApiRequest[ChatMessagesQuery, None]) -> ASGIApp:
        """`GET /api/chat/{chat_id}/messages`; a chat that nothing was sent to yet has none."""
        chat = await self._find_chat(request)
        if chat is None:
            return reply(ChatMessages([], None))
        page = await self._node.conversations.messages(
            request.user_id,
            chat.conversation_id,
            limit=request.query.limit,
            before=request.query.before,
            with_superseded=False,
        )
        turn_ids = {row["turn_id"] for row in page.messages if row["turn_id"] is not None}
        messages, next_before = shown_messages(page, await self._node.conversations.usage(turn_ids))
        return reply(ChatMessages(messages, next_before))

    async def ticket(self, request: AnyApiRequest) -> ASGIApp:
        """`POST /auth/ticket`."""
        return reply(Ticket(*await self._tickets.issue(request.identity)), 201)

    async def _find_chat(self, request: AnyApiRequest) -> Chat | None:
        return await self._node.conversations.find_chat(request.user_id, request.texts["chat_id"])

    def _stream(self, request: AnyApiRequest, turn: TurnRef, *, is_new: bool) -> ASGIApp:
        stream = chunk_stream(
            self._node, request, turn, is_new=is_new, heartbeat_seconds=self._settings.heartbeat_seconds
        )
        return self._sessions.streaming(request, stream)
