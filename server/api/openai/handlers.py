"""The Responses API over HTTP: what each operation does, and a response as a stream that any node can go on with."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Final, TypeAlias
from uuid import UUID

from msgspec import UNSET
from starlette.types import ASGIApp, Receive, Scope, Send

from anynode.models.client_chats import find_sent
from anynode.models.conversations import Admission
from anynode.models.database import Database, Unavailable
from anynode.models.events import Event
from anynode.models.ids import uuid7
from anynode.models.messages import read_messages
from anynode.models.rules import RUNNING
from anynode.models.turns import FoundTurn, find_turn
from anynode.server.api.openai.bodies import (
    CreateResponse,
    Model,
    Models,
    ResponseObject,
    ResponseQuery,
    response_id_of,
    turn_of,
)
from anynode.server.api.openai.fold import Fold, stored_events, stored_response
from anynode.server.api.openai.wire import ErrorEvent, StreamEvent
from anynode.server.engine.node import Node
from anynode.server.errors import (
    ClientError,
    ConversationBusy,
    DatabaseUnavailable,
    Draining,
    InternalError,
    InvalidFrame,
    NotFound,
    Problem,
    RoleOrder,
)
from anynode.server.protocol.bodies import NoQuery
from anynode.server.protocol.encoding import encode
from anynode.server.protocol.frames import ID_CHARACTERS_MAX, MessageSend, is_client_id
from anynode.server.settings import Settings
from anynode.server.transport.cut_short import LAST_WORDS_SECONDS, CutShort, until
from anynode.server.transport.http import Call, Holding, refusal, reply
from anynode.server.transport.sse import COMMENT, or_silence, stream_turn, write
from anynode.server.transport.turn_end import end_of_turn, stored_turn
from anynode.server.transport.turn_events import JournalGone, events_of_turn

logger = logging.getLogger("anynode.responses")

CANCEL_SECONDS: Final = 5.0  # how long a cancelled turn is waited for; its node may be dead
EVENTS_AT_ONCE: Final = 200  # of the journal, that a stream takes without letting others run: about a millisecond
NO_RESPONSE: Final = "There is no such response."

AnyCall: TypeAlias = Call[Any, Any]


class Responses:
    """What serves the operations; `holding` bounds those that wait or stream."""

    def __init__(self, settings: Settings, node: Node, database: Database, holding: Holding) -> None:
        self._settings = settings
        self._node = node
        self._database = database
        self._holding = holding
        self._model = model_of(settings)

    async def create(self, call: Call[NoQuery, CreateResponse]) -> ASGIApp:
        """`POST /v1/responses`."""
        request = call.body
        key = _idempotency_key(call)
        with self._holding():
            try:
                admission = await self._admitted(call, key)
            except DatabaseUnavailable as error:  # it may have been admitted
                return refusal(error, _retried(key))
            assert admission.turn_id is not None
            turn = FoundTurn(admission.conversation_id, admission.turn_id, RUNNING, admission.first_seq)
            if not request.stream and not request.background:
                return await self._ended(call, turn, key)
        # Without an await in between, so that there is room for the stream.
        if request.stream:
            return self._holding.streaming(self._stream(call, turn, None))
        if admission.outcome == "admitted":
            return reply(Fold(turn.turn_id, turn.conversation_id, self._model).response())
        return reply(await self._stored(call.user_id, turn))

    async def retrieve(self, call: Call[ResponseQuery, None]) -> ASGIApp:
        """`GET /v1/responses/{response_id}`."""
        turn = await self._find(call.user_id, call.texts["response_id"])
        if not call.query.stream:
            return reply(await self._stored(call.user_id, turn))
        after = None if call.query.starting_after is UNSET else call.query.starting_after
        if after is not None and turn.first_seq is None:
            problem = "the events of this response are no longer kept: get it without `stream`, or from its start"
            raise InvalidFrame(problems=[Problem("query.starting_after", problem)])
        return self._holding.streaming(self._stream(call, turn, after))

    async def cancel(self, call: AnyCall) -> ASGIApp:
        """`POST /v1/responses/{response_id}/cancel`."""
        turn = await self._find(call.user_id, call.texts["response_id"])
        with self._holding():
            await self._node.cancel(call.user_id, turn.conversation_id, turn.turn_id)
            try:
                async with asyncio.timeout(CANCEL_SECONDS):
                    await call.while_connected(self._end(call.user_id, turn))
            except TimeoutError:
                pass  # it is told as it is: in progress
            return reply(await self._stored(call.user_id, turn))

    async def models(self, call: AnyCall) -> ASGIApp:
        """`GET /v1/models`."""
        return reply(Models([Model(self._model)]))

    async def model(self, call: AnyCall) -> ASGIApp:
        """`GET /v1/models/{model}`."""
        if call.texts["model"] != self._model:
            raise NotFound("There is no such model.")
        return reply(Model(self._model))

    async def _find(self, user_id: str, response_id: str) -> FoundTurn:
        turn_id = turn_of(response_id)
        turn = None if turn_id is None else await find_turn(self._database, user_id, turn_id)
        if turn is None:
            raise NotFound(NO_RESPONSE)
        return turn

    async def _admitted(self, call: Call[NoQuery, CreateResponse], key: str | None) -> Admission:
        conversation_id = await self._conversation_of(call, key)
        frame = MessageSend(key or str(uuid7()), call.body.question, conversation_id)
        return await self._node.send(call.user_id, frame)

    async def _conversation_of(self, call: Call[NoQuery, CreateResponse], key: str | None) -> UUID | None:
        """The conversation that is to go on. Raises RoleOrder where it has gone on from the previous response already:
        there is one history, and no branch."""
        previous_id = call.body.previous_turn_id
        if previous_id is None:
            return call.body.conversation_id
        previous = await find_turn(self._database, call.user_id, previous_id)
        if previous is None:
            raise NotFound(NO_RESPONSE)
        conversation_id = previous.conversation_id
        page = await read_messages(self._database, call.user_id, conversation_id, limit=1, before=None)
        if page is None:
            raise NotFound(NO_RESPONSE)
        if all(row["turn_id"] == previous_id for row in page.messages):
            return conversation_id
        # Or this is what it has gone on with, sent again.
        if key is not None and await find_sent(self._database, call.user_id, key) is not None:
            return conversation_id
        raise RoleOrder(
            "The conversation has gone on since that response: name the conversation, to go on from its end.",
            conversation_id=conversation_id,
        )

    async def _stored(self, user_id: str, turn: FoundTurn) -> ResponseObject:
        stored = await stored_turn(self._database, user_id, turn.conversation_id, turn.turn_id)
        return stored_response(stored, self._model)

    async def _ended(self, call: AnyCall, turn: FoundTurn, key: str | None) -> ASGIApp:
        """The response at its end. What goes wrong with waiting for it does not end it, so its ids are told."""
        try:
            await call.while_connected(self._wait(call.user_id, turn))
            response = await self._stored(call.user_id, turn)
            if response.status == "in_progress":
                raise ConversationBusy  # its end was lost with a failover: it runs again
            return reply(response)
        except Unavailable:
            error: ClientError = DatabaseUnavailable()
        except NotFound:
            raise  # it has been deleted
        except ClientError as refused:
            error = refused
        error.message += f" The response goes on: get it as {response_id_of(turn.turn_id)}."
        return refusal(
            error,
            _retried(key),
            conversation_id=turn.conversation_id,
            message_id=UNSET if key is None else key,
        )

    async def _wait(self, user_id: str, turn: FoundTurn) -> None:
        try:
            # It may be that this very end has let the drain be over.
            await until(self._end(user_id, turn), self._node.drained.wait(), grace_seconds=LAST_WORDS_SECONDS)
        except CutShort:
            raise Draining("This node is shutting down.") from None

    async def _end(self, user_id: str, turn: FoundTurn) -> None:
        if turn.first_seq is not None:
            await end_of_turn(self._node, user_id, turn.conversation_id, turn.turn_id, turn.first_seq)

    def _stream(self, call: AnyCall, turn: FoundTurn, after: int | None) -> ResponseStream:
        return ResponseStream(
            self._node,
            self._database,
            call,
            turn,
            after,
            model=self._model,
            heartbeat_seconds=self._settings.heartbeat_seconds,
        )


class ResponseStream:
    """The ASGI application that shows one turn, which is known to be the user's, from its start or after a sequence
    number (`after`), to its end. Where it is cut before (the client goes, the token runs out, the node goes down), the
    connection breaks off: it must not look whole."""

    def __init__(
        self,
        node: Node,
        database: Database,
        call: AnyCall,
        turn: FoundTurn,
        after: int | None,
        *,
        model: str,
        heartbeat_seconds: float,
    ) -> None:
        self._node = node
        self._database = database
        self._call = call
        self._turn = turn
        self._after = -1 if after is None else after
        self._model = model
        self._heartbeat_seconds = heartbeat_seconds
        self._fold = Fold(turn.turn_id, turn.conversation_id, model)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve it."""
        call = self._call
        await stream_turn(scope, send, self._show, self._node, call.identity, call.disconnected)

    async def _show(self, send: Send) -> bool:
        """Whether it was shown to its end."""
        try:
            if self._turn.first_seq is None:
                return await self._show_stored(send)
            try:
                async with aclosing(self._batches(self._turn.first_seq)) as batches:
                    async for events in batches:
                        if events is None:
                            await write(send, COMMENT)
                        else:
                            await self._write_folded(send, events)
            except JournalGone:  # after the turn's end it was deleted before it was read
                is_fresh = self._fold.sequence_number == 0 and self._after < 0
                return is_fresh and await self._show_stored(send)
            return True
        except ClientError as error:  # it has been deleted
            await self._last_words(send, error)
        except Unavailable as error:
            logger.warning("response %s cannot be shown: %s", response_id_of(self._turn.turn_id), error)
        except OSError:
            pass  # the client has gone
        except Exception:
            logger.exception("response %s could not be shown", response_id_of(self._turn.turn_id))
            await self._last_words(send, InternalError())
        return False

    async def _show_stored(self, send: Send) -> bool:
        user_id, turn = self._call.user_id, self._turn
        stored = await stored_turn(self._database, user_id, turn.conversation_id, turn.turn_id)
        if stored.status == RUNNING:  # its events were lost with a failover
            return False
        await self._write(send, stored_events(stored, self._model))
        return True

    def _batches(self, first_seq: int) -> AsyncGenerator[Sequence[Event] | None, None]:
        """The turn's events as they come, and None whenever there was none for long."""
        user_id, turn = self._call.user_id, self._turn
        events = events_of_turn(self._node.follows, user_id, turn.conversation_id, turn.turn_id, first_seq)
        return or_silence(events, self._heartbeat_seconds)

    async def _write_folded(self, send: Send, events: Sequence[Event]) -> None:
        for start in range(0, len(events), EVENTS_AT_ONCE):
            part = events[start : start + EVENTS_AT_ONCE]
            await self._write(send, [shown for event in part for shown in self._fold.add(event)])
            await asyncio.sleep(0)  # other turns go on, however much there is to catch up with

    async def _write(self, send: Send, events: Sequence[StreamEvent]) -> None:
        pieces = [_data(event) for event in events if event.sequence_number > self._after]
        if pieces:
            await write(send, b"".join(pieces))

    async def _last_words(self, send: Send, error: ClientError) -> None:
        number = max(self._fold.sequence_number, self._after + 1)
        try:
            await write(send, _data(ErrorEvent(error.code, error.message, number)))
        except OSError:
            pass


def model_of(settings: Settings) -> str:
    """What the server's agent is called as a model."""
    if settings.agent == "openai":
        return settings.model
    return settings.agent.rpartition(":")[2]


def _idempotency_key(call: AnyCall) -> str | None:
    key = call.headers.get("idempotency-key")
    if key is not None and not is_client_id(key):
        problem = f"is not 1 to {ID_CHARACTERS_MAX} printable characters"
        raise InvalidFrame(problems=[Problem("Idempotency-Key", problem)])
    return key


def _retried(key: str | None) -> dict[str, str]:
    """Stock clients send by themselves again what has failed; without a key it would be another question."""
    return {"x-should-retry": "false" if key is None else "true"}


def _data(event: StreamEvent | ErrorEvent) -> bytes:
    # JSON has no line break outside of its strings, and none unescaped inside.
    return f"event: {type(event).__struct_config__.tag}\ndata: {encode(event)}\n\n".encode()
