"""Conversations over HTTP: what each operation does. `bodies` has what it takes and gives, `operations` the list."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeAlias
from urllib.parse import urlencode
from uuid import UUID

import asyncpg
import msgspec
from msgspec import UNSET, Raw, UnsetType
from starlette.types import ASGIApp, Receive, Scope, Send

from anynode.models.conversations import (
    Admission,
    create_conversation,
    list_conversations,
    read_conversation,
    update_conversation,
)
from anynode.models.database import Database, Unavailable
from anynode.models.ids import uuid7
from anynode.models.messages import read_messages
from anynode.models.text import is_storable
from anynode.server.api.export import exported
from anynode.server.engine.node import Node
from anynode.server.errors import (
    ClientError,
    DatabaseUnavailable,
    InvalidFrame,
    MessageTooLarge,
    NotFound,
    Problem,
)
from anynode.server.protocol.bodies import (
    Appended,
    Body,
    Cancel,
    CancelledTurn,
    Chat,
    ChatAnswer,
    Continue,
    Conversation,
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
from anynode.server.protocol.encoding import message_of
from anynode.server.protocol.frames import SEQ_MAX, MessageSend, TurnRegenerate
from anynode.server.settings import Settings
from anynode.server.transport.http import Call, Holding, refusal, reply
from anynode.server.transport.sse import EventStream
from anynode.server.transport.turn_end import answer_of, stored_turn

METADATA_BYTES_MAX: Final = 16_384
METADATA_DEPTH_MAX: Final = 100
MESSAGES_LISTED: Final = 50  # unless a `limit` is given …
MESSAGES_EXPORTED: Final = 1000  # … which for an export is as much as there may be

MARK_DIGITS_MAX: Final = 16  # until the year 2286

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
AnyCall: TypeAlias = Call[Any, Any]


class Rest:
    """What serves the operations on conversations; `holding` bounds those that wait or stream."""

    def __init__(self, settings: Settings, node: Node, database: Database, holding: Holding) -> None:
        self._settings = settings
        self._node = node
        self._database = database
        self._holding = holding

    # Conversations.

    async def create(self, call: Call[NoQuery, NewConversation]) -> ASGIApp:
        """`POST /conversations`."""
        fields = self._stored(call.body)
        row = await create_conversation(
            self._database,
            call.user_id,
            uuid7(),
            title=fields["title"],
            system_prompt=fields["system_prompt"],
            metadata=fields["metadata"] or "{}",
            created_at=datetime.now(UTC),
        )
        return reply(_conversation(row), 201, {"Location": f"/conversations/{row['id']}"})

    async def list(self, call: Call[ConversationsQuery, None]) -> ASGIApp:
        """`GET /conversations`."""
        limit, skip, before = call.query.limit, call.query.skip, call.query.before
        place = None if before is UNSET else _place(before)
        search = None if call.query.search is UNSET else call.query.search
        if search is not None and not is_storable(search):
            raise InvalidFrame(problems=[Problem("query.search", "has a NUL")])
        rows = await list_conversations(
            self._database, call.user_id, limit=limit + 1, skip=skip, before=place, search=search
        )
        listed = [_conversation(row) for row in rows[:limit]]
        is_more = len(rows) > limit
        return reply(
            Conversations(
                listed,
                skip + limit if is_more and place is None else None,
                _mark(listed[-1]) if is_more else None,
            )
        )

    async def read(self, call: AnyCall) -> ASGIApp:
        """`GET /conversations/{conversation_id}`."""
        return reply(_conversation(await self._own(call)))

    async def update(self, call: Call[NoQuery, ConversationChanges]) -> ASGIApp:
        """`PATCH /conversations/{conversation_id}`."""
        changes = self._stored(call.body)
        row = await update_conversation(self._database, call.user_id, call.conversation_id, changes)
        if row is None:
            raise NotFound
        return reply(_conversation(row))

    async def delete(self, call: AnyCall) -> ASGIApp:
        """`DELETE /conversations/{conversation_id}`."""
        await self._node.delete(call.user_id, call.conversation_id)
        return _no_content

    # Messages.

    async def messages(self, call: Call[MessagesQuery, None]) -> ASGIApp:
        """`GET /conversations/{conversation_id}/messages`."""
        is_export = call.query.format is not UNSET
        before = None if call.query.before is UNSET else call.query.before
        limit = call.query.limit or (MESSAGES_EXPORTED if is_export else MESSAGES_LISTED)
        page = await read_messages(
            self._database,
            call.user_id,
            call.conversation_id,
            limit=limit,
            before=before,
            with_superseded=not is_export,
        )
        if page is None:
            await self._own(call)
            raise NotFound("There is no such message in this conversation.")
        next_before = None if page.is_first else page.messages[0]["id"]
        headers = {} if next_before is None else {"Link": _link(call, limit, next_before)}
        if is_export:
            return reply(exported(page), headers=headers)
        return reply(Messages([message_of(row) for row in page.messages], next_before), headers=headers)

    async def append(self, call: AnyCall) -> ASGIApp:
        """`POST /conversations/{conversation_id}/messages`."""
        is_bulk = isinstance(call.body, NewMessages)
        given = call.body.messages if is_bulk else [call.body]
        messages, seq = await self._node.append(call.user_id, call.conversation_id, given)
        return reply(Appended(messages, seq) if is_bulk else messages[0], 201)

    # Turns.

    async def proceed(self, call: Call[NoQuery, Continue]) -> ASGIApp:
        """`POST /conversations/{conversation_id}/continue`."""
        body = call.body
        frame = MessageSend(body.message_id or str(uuid7()), body.content, call.conversation_id, body.if_busy)
        with self._holding():
            admission = await self._node.send(call.user_id, frame)
            return await self._answered(call, admission, frame.message_id) if body.wait else _started(admission)

    async def regenerate(self, call: Call[NoQuery, Regenerate]) -> ASGIApp:
        """`POST /conversations/{conversation_id}/regenerate`."""
        with self._holding():
            frame = TurnRegenerate(call.conversation_id, call.body.message_id)
            admission = await self._node.regenerate(call.user_id, frame)
            return await self._answered(call, admission) if call.body.wait else _started(admission)

    async def chat(self, call: Call[NoQuery, Chat]) -> ASGIApp:
        """`POST /api/{user_id}/chat`."""
        body = call.body
        frame = MessageSend(body.message_id or str(uuid7()), body.message, body.conversation_id, body.if_busy)
        with self._holding():
            admission = await self._node.send(call.user_id, frame)
            return await self._answered(call, admission, frame.message_id, is_short=True)

    async def cancel(self, call: Call[NoQuery, Cancel]) -> ASGIApp:
        """`POST /conversations/{conversation_id}/cancel`."""
        turn_id = await self._node.cancel(call.user_id, call.conversation_id, call.body.turn_id)
        return reply(CancelledTurn(call.conversation_id, turn_id))

    async def turn(self, call: AnyCall) -> ASGIApp:
        """`GET /conversations/{conversation_id}/turns/{turn_id}`."""
        return reply(await stored_turn(self._database, call.user_id, call.conversation_id, call.ids["turn_id"]))

    async def events(self, call: Call[EventsQuery, None]) -> ASGIApp:
        """`GET /conversations/{conversation_id}/events`."""
        after = None if call.query.after is UNSET else call.query.after
        if (last := call.headers.get("last-event-id")) is not None:  # of a client that comes back to the same address
            if not (last.isascii() and last.isdigit() and len(last) < 20 and int(last) <= SEQ_MAX):
                raise InvalidFrame(problems=[Problem("Last-Event-ID", "is not a seq")])
            after = int(last)
        await self._own(call)
        stream = EventStream(
            self._node,
            call.identity,
            call.conversation_id,
            after,
            disconnected=call.disconnected,
            heartbeat_seconds=self._settings.heartbeat_seconds,
        )

        return self._holding.streaming(stream)

    # What they share.

    async def _own(self, call: AnyCall) -> asyncpg.Record:
        row = await read_conversation(self._database, call.user_id, call.conversation_id)
        if row is None:
            raise NotFound
        return row

    async def _answered(
        self, call: AnyCall, admission: Admission, message_id: str | UnsetType = UNSET, *, is_short: bool = False
    ) -> ASGIApp:
        """The end of a turn. What goes wrong with waiting for it does not end the turn, so the ids are told."""
        try:
            answer = await call.while_connected(answer_of(self._node, self._database, call.user_id, admission))
        except Unavailable:
            error: ClientError = DatabaseUnavailable()
        except ClientError as refused:
            error = refused
        else:
            return reply(ChatAnswer(answer.conversation_id, answer.response, answer.tool_calls) if is_short else answer)
        return refusal(error, conversation_id=admission.conversation_id, message_id=message_id)

    def _stored(self, body: Body) -> dict[str, str | None]:
        """The fields that a body has, as the database takes them. Raises MessageTooLarge."""
        stored: dict[str, str | None] = {}
        for name, value in msgspec.structs.asdict(body).items():
            if name == "metadata" and value is not UNSET:
                if _is_deep(value):
                    raise InvalidFrame(problems=[Problem(name, "is nested too deeply")])
                value = msgspec.json.encode(value).decode()
            if value is not UNSET:
                stored[name] = value
        if len((stored.get("system_prompt") or "").encode()) > self._settings.message_bytes_max:
            raise MessageTooLarge(f"system_prompt is longer than {self._settings.message_bytes_max} bytes.")
        if _stored_bytes(stored.get("metadata") or "") > METADATA_BYTES_MAX:
            raise MessageTooLarge(f"metadata is longer than {METADATA_BYTES_MAX} bytes.")
        return stored


def _is_deep(value: object) -> bool:
    level = [value]
    for _ in range(METADATA_DEPTH_MAX):
        level = [item for each in level for item in _items(each)]
    return bool(level)


def _items(value: object) -> Iterable[object]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _stored_bytes(text: str) -> int:
    """How long JSON is as Postgres stores it: numbers with all their digits, 1e308 with 309."""
    size = len(text.encode())

    def count(number: str) -> float:
        nonlocal size
        size += abs(int(number.lower().partition("e")[2] or 0))
        return 0.0

    if text:
        json.loads(text, parse_float=count)
    return size


def _conversation(row: asyncpg.Record) -> Conversation:
    return Conversation(
        row["id"],
        row["client_id"],
        row["title"],
        row["system_prompt"],
        Raw(row["metadata"].encode()),
        row["last_seq"],
        row["created_at"],
        row["updated_at"],
    )


def _started(admission: Admission) -> ASGIApp:
    assert admission.turn_id is not None
    after = None if admission.first_seq is None else admission.first_seq - 1
    return reply(StartedTurn(admission.conversation_id, admission.turn_id, after), 202)


def _link(call: Call[MessagesQuery, None], limit: int, before: UUID) -> str:
    parameters = {"limit": limit, "before": before}
    if call.query.format is not UNSET:
        parameters["format"] = call.query.format
    return f'</conversations/{call.conversation_id}/messages?{urlencode(parameters)}>; rel="next"'


# A place in the list of conversations, behind which the next page begins: a time in microseconds, and an id.


def _mark(conversation: Conversation) -> str:
    return f"{(conversation.updated_at - _EPOCH) // timedelta(microseconds=1)}.{conversation.id}"


def _place(mark: str) -> tuple[datetime, UUID]:
    time, _, id = mark.partition(".")
    try:
        if not (time.isascii() and time.isdigit() and len(time) <= MARK_DIGITS_MAX):
            raise ValueError(time)
        return _EPOCH + timedelta(microseconds=int(time)), msgspec.convert(id, UUID)
    except ValueError:  # msgspec's too
        raise InvalidFrame(problems=[Problem("query.before", "is not a next_before of this list")]) from None


async def _no_content(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})
