"""The REST API: what each operation on conversations does. `operations` lists them."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from typing import Final
from urllib.parse import urlencode
from uuid import UUID

import msgspec
from msgspec import UNSET, UnsetType
from starlette.types import ASGIApp

from anynode.models.events import Event
from anynode.models.listing import Place
from anynode.models.text import is_storable
from anynode.server.api.export import exported
from anynode.server.engine.admission import Admitted, new_message_id
from anynode.server.engine.conversations import Snapshot
from anynode.server.engine.node import Node
from anynode.server.engine.turn_reader import TurnRef
from anynode.server.errors import ClientError, DatabaseUnavailable, InvalidFrame, Problem
from anynode.server.protocol.bodies import (
    SKIP_MAX,
    Appended,
    Body,
    Cancel,
    CancelledTurn,
    Chat,
    ChatAnswer,
    Continue,
    ConversationChanges,
    Conversations,
    ConversationsQuery,
    EventsQuery,
    Messages,
    MessagesQuery,
    NewConversation,
    NewMessages,
    NoQuery,
    Regenerate,
    StartedTurn,
)
from anynode.server.protocol.conversation_fields import stored_fields
from anynode.server.protocol.encoding import encode, error_frame, message_of, numbered_frames, snapshot_frame
from anynode.server.protocol.frames import SEQ_MAX, Heartbeat, MessageSend, TurnRegenerate
from anynode.server.settings import Settings
from anynode.server.transport.http import AnyApiRequest, ApiRequest, no_content, refusal, reply
from anynode.server.transport.long_frames import encode_rows, encode_update
from anynode.server.transport.sessions import Sessions
from anynode.server.transport.sse import EventStream, sse_data
from anynode.server.transport.turn_end import answer_of

MESSAGES_LISTED: Final = 50  # unless a `limit` is given …
MESSAGES_EXPORTED: Final = 1000  # … which for an export is as much as there may be
RETRY_MILLISECONDS: Final = (200, 1000)  # from, to: clients of a node that goes away come back one by one
MARK_DIGITS_MAX: Final = 16  # until the year 2286

_HEARTBEAT: Final = sse_data(encode(Heartbeat()))
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class Rest:
    """Serves the operations on conversations; `sessions` counts the requests that wait or stream."""

    def __init__(self, settings: Settings, node: Node, sessions: Sessions) -> None:
        self._settings = settings
        self._node = node
        self._sessions = sessions

    # Conversations.

    async def create(self, request: ApiRequest[NoQuery, NewConversation]) -> ASGIApp:
        """`POST /conversations`."""
        fields = self._fields(request.body)
        client_id = fields.pop("client_id")
        if client_id is None:
            is_new = True
            conversation = await self._node.conversations.create(
                request.user_id, limits=request.identity.limits, **fields
            )
        else:
            conversation, is_new = await self._node.conversations.get_or_create(
                request.user_id, client_id, limits=request.identity.limits, **fields
            )
        return reply(conversation, 201 if is_new else 200, {"Location": f"/conversations/{conversation.id}"})

    async def list(self, request: ApiRequest[ConversationsQuery, None]) -> ASGIApp:
        """`GET /conversations`."""
        limit, skip, before = request.query.limit, request.query.skip, request.query.before
        place = None if before is UNSET else _place(before)
        search = None if request.query.search is UNSET else request.query.search
        if search is not None and not is_storable(search):
            raise InvalidFrame(problems=[Problem("query.search", "has a NUL")])
        page = await self._node.conversations.list(request.user_id, limit=limit, skip=skip, before=place, search=search)
        next_before = None if page.next_place is None else _mark(page.next_place)
        next_skip = skip + len(page.conversations)
        can_skip = page.next_place is not None and page.is_searched_to_its_end
        if not can_skip or place is not None or next_skip > SKIP_MAX:
            return reply(Conversations(page.conversations, None, next_before))
        return reply(Conversations(page.conversations, next_skip, next_before))

    async def read(self, request: AnyApiRequest) -> ASGIApp:
        """`GET /conversations/{conversation_id}`."""
        return reply(await self._node.conversations.read(request.user_id, request.conversation_id))

    async def update(self, request: ApiRequest[NoQuery, ConversationChanges]) -> ASGIApp:
        """`PATCH /conversations/{conversation_id}`."""
        changes = self._fields(request.body)
        return reply(
            await self._node.conversations.update(
                request.user_id, request.conversation_id, changes, limits=request.identity.limits
            )
        )

    async def delete(self, request: AnyApiRequest) -> ASGIApp:
        """`DELETE /conversations/{conversation_id}`."""
        await self._node.delete(request.user_id, request.conversation_id)
        return no_content

    # Messages.

    async def messages(self, request: ApiRequest[MessagesQuery, None]) -> ASGIApp:
        """`GET /conversations/{conversation_id}/messages`."""
        is_export = request.query.format is not UNSET
        limit = request.query.limit or (MESSAGES_EXPORTED if is_export else MESSAGES_LISTED)
        page = await self._node.conversations.messages(
            request.user_id,
            request.conversation_id,
            limit=limit,
            before=None if request.query.before is UNSET else request.query.before,
            with_superseded=not is_export,
        )
        next_before = None if page.is_first else page.messages[0]["id"]
        headers = {} if next_before is None else {"Link": _link(request, limit, next_before)}
        if is_export:
            return await encode_rows(page.messages, lambda: reply(exported(page), headers=headers))
        return await encode_rows(
            page.messages,
            lambda: reply(Messages([message_of(row) for row in page.messages], next_before), headers=headers),
        )

    async def append(self, request: AnyApiRequest) -> ASGIApp:
        """`POST /conversations/{conversation_id}/messages`."""
        is_bulk = isinstance(request.body, NewMessages)
        given = request.body.messages if is_bulk else [request.body]
        messages, seq = await self._node.append(
            request.user_id, request.conversation_id, given, limits=request.identity.limits
        )
        return reply(Appended(messages, seq) if is_bulk else messages[0], 201)

    # Turns.

    async def proceed(self, request: ApiRequest[NoQuery, Continue]) -> ASGIApp:
        """`POST /conversations/{conversation_id}/continue`."""
        body = request.body
        if body.content is None:
            return await self._answer_appended(request)
        frame = MessageSend(body.message_id or new_message_id(), body.content, request.conversation_id, body.if_busy)
        with self._sessions.waiting(request):
            admitted = await self._node.send(request.user_id, frame, limits=request.identity.limits)
            return await self._answer(request, admitted, frame.message_id) if body.wait else _started(admitted)

    async def _answer_appended(self, request: ApiRequest[NoQuery, Continue]) -> ASGIApp:
        """Answer the question that was appended last.

        A turn that runs is not interrupted, whatever `if_busy` says: it answers the last question, so its end would
        leave nothing to answer.
        """
        if request.body.message_id is not None:
            problem = "is the id of a new question, so it needs content; leave both out to answer an appended one"
            raise InvalidFrame(problems=[Problem("message_id", problem)])
        with self._sessions.waiting(request):
            admitted = await self._node.answer(request.user_id, request.conversation_id, limits=request.identity.limits)
            return await self._answer(request, admitted) if request.body.wait else _started(admitted)

    async def regenerate(self, request: ApiRequest[NoQuery, Regenerate]) -> ASGIApp:
        """`POST /conversations/{conversation_id}/regenerate`."""
        with self._sessions.waiting(request):
            frame = TurnRegenerate(request.conversation_id, request.body.message_id)
            admitted = await self._node.regenerate(request.user_id, frame, limits=request.identity.limits)
            return await self._answer(request, admitted) if request.body.wait else _started(admitted)

    async def chat(self, request: ApiRequest[NoQuery, Chat]) -> ASGIApp:
        """`POST /api/{user_id}/chat`."""
        body = request.body
        frame = MessageSend(body.message_id or new_message_id(), body.message, body.conversation_id, body.if_busy)
        with self._sessions.waiting(request):
            admitted = await self._node.send(request.user_id, frame, limits=request.identity.limits)
            return await self._answer(request, admitted, frame.message_id, is_short=True)

    async def cancel(self, request: ApiRequest[NoQuery, Cancel]) -> ASGIApp:
        """`POST /conversations/{conversation_id}/cancel`."""
        turn_id = await self._node.cancel(request.user_id, request.conversation_id, request.body.turn_id)
        return reply(CancelledTurn(request.conversation_id, turn_id))

    async def turn(self, request: AnyApiRequest) -> ASGIApp:
        """`GET /conversations/{conversation_id}/turns/{turn_id}`."""
        turn = TurnRef(request.user_id, request.conversation_id, request.ids["turn_id"], None)
        return reply(await self._node.turns.stored(turn))

    async def events(self, request: ApiRequest[EventsQuery, None]) -> ASGIApp:
        """`GET /conversations/{conversation_id}/events`."""
        after = None if request.query.after is UNSET else request.query.after
        if (last := request.headers.get("last-event-id")) is not None:  # of a client that comes back to this address
            if not (last.isascii() and last.isdigit() and len(last) < 20 and int(last) <= SEQ_MAX):
                raise InvalidFrame(problems=[Problem("Last-Event-ID", "is not a seq")])
            after = int(last)
        await self._node.conversations.read(request.user_id, request.conversation_id)
        stream = EventStream(
            node=self._node,
            request=request,
            pieces=self._frames(request, after),
            last_words=lambda error: sse_data(error_frame(error, None)),
            heartbeat=_HEARTBEAT,
            heartbeat_seconds=self._settings.heartbeat_seconds,
            must_be_whole=False,
        )
        return self._sessions.streaming(request, stream)

    async def _frames(self, request: AnyApiRequest, after: int | None) -> AsyncGenerator[bytes, None]:
        """Yield the frames of the socket, each with its seq as `id`."""
        yield f"retry: {random.randint(*RETRY_MILLISECONDS)}\n\n".encode()  # noqa: S311
        conversation_id = request.conversation_id
        following = self._node.follows.keep_following(request.user_id, conversation_id, after, is_own=True)
        async with aclosing(following) as updates:
            async for update in updates:
                if isinstance(update, DatabaseUnavailable):
                    piece = sse_data(error_frame(DatabaseUnavailable(), None))
                else:
                    piece = await encode_update(update, _piece, conversation_id)
                del update
                yield piece
                del piece

    async def _answer(
        self,
        request: AnyApiRequest,
        admitted: Admitted,
        message_id: str | UnsetType = UNSET,
        *,
        is_short: bool = False,
    ) -> ASGIApp:
        """Wait for the end of a turn. What goes wrong with waiting does not end the turn, so its ids are told."""
        try:
            answer = await request.while_connected(answer_of(self._node, admitted.turn))
        except ClientError as error:
            return refusal(error, conversation_id=admitted.turn.conversation_id, message_id=message_id)
        return reply(ChatAnswer(answer.conversation_id, answer.response, answer.tool_calls) if is_short else answer)

    def _fields(self, body: Body) -> dict[str, str | None]:
        """Return the fields that a body has, as the database takes them. Raises InvalidFrame or MessageTooLarge."""
        return stored_fields(body, system_prompt_bytes_max=self._settings.message_bytes_max)


def _piece(conversation_id: UUID, update: Snapshot | Sequence[Event]) -> bytes:
    """Return the frames of an update, each with its seq as `id`."""
    if isinstance(update, Snapshot):
        return sse_data(snapshot_frame(conversation_id, update), id=update.seq)
    return b"".join(sse_data(frame, id=seq) for seq, frame in numbered_frames(conversation_id, update))


def _started(admitted: Admitted) -> ASGIApp:
    turn = admitted.turn
    after = None if turn.first_seq is None else turn.first_seq - 1
    return reply(StartedTurn(turn.conversation_id, turn.turn_id, after), 202)


def _link(request: ApiRequest[MessagesQuery, None], limit: int, before: UUID) -> str:
    parameters = {"limit": limit, "before": before}
    if request.query.format is not UNSET:
        parameters["format"] = request.query.format
    return f'</conversations/{request.conversation_id}/messages?{urlencode(parameters)}>; rel="next"'


# A mark is a place in the list of conversations, behind which the next page begins: microseconds, a dot, and an id.


def _mark(place: Place) -> str:
    updated_at, id = place
    return f"{(updated_at - _EPOCH) // timedelta(microseconds=1)}.{id}"


def _place(mark: str) -> Place:
    time, _, id = mark.partition(".")
    try:
        if not (time.isascii() and time.isdigit() and len(time) <= MARK_DIGITS_MAX):
            raise ValueError(time)
        return _EPOCH + timedelta(microseconds=int(time)), msgspec.convert(id, UUID)
    except ValueError:  # msgspec's too
        raise InvalidFrame(problems=[Problem("query.before", "is not a next_before of this list")]) from None
