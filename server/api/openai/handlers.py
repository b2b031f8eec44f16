"""The OpenAI Responses API over HTTP: what each operation does."""

from __future__ import annotations

from typing import Final
from uuid import UUID

from msgspec import UNSET
from starlette.types import ASGIApp

from anynode.server.api.openai.bodies import (
    CreateResponse,
    Model,
    Models,
    ResponseObject,
    ResponseQuery,
    response_id_of,
    turn_of,
)
from anynode.server.api.openai.fold import Fold, stored_response
from anynode.server.api.openai.stream import response_stream
from anynode.server.engine.admission import Admitted, new_message_id
from anynode.server.engine.node import Node
from anynode.server.engine.turn_reader import TurnInterrupted, TurnRef
from anynode.server.errors import ClientError, DatabaseUnavailable, InvalidFrame, NotFound, Problem, RoleOrder
from anynode.server.protocol.bodies import NoQuery
from anynode.server.protocol.frames import ID_CHARACTERS_MAX, MessageSend, is_client_id
from anynode.server.settings import Settings
from anynode.server.transport.http import AnyApiRequest, ApiRequest, refusal, reply
from anynode.server.transport.sessions import Sessions
from anynode.server.transport.turn_end import wait_end, wait_stopped

CANCEL_SECONDS: Final = 5.0  # how long a cancelled turn is waited for; its node may be dead
NO_RESPONSE: Final = "There is no such response."


class Responses:
    """Serves the operations of the Responses API; `sessions` counts the requests that wait or stream."""

    def __init__(self, settings: Settings, node: Node, sessions: Sessions) -> None:
        self._settings = settings
        self._node = node
        self._sessions = sessions
        self._model = model_of(settings)

    async def create(self, request: ApiRequest[NoQuery, CreateResponse]) -> ASGIApp:
        """`POST /v1/responses`."""
        body = request.body
        key = _idempotency_key(request)
        with self._sessions.waiting(request):
            try:
                admitted = await self._admit(request, key)
            except DatabaseUnavailable as error:  # it may have been admitted
                return refusal(error, _retry_headers(key))
            turn = admitted.turn
            if not body.stream and not body.background:
                return await self._answer(request, turn, key)
        # Without an await in between, so that there is room for the stream.
        if body.stream:
            return self._sessions.streaming(request, self._stream(request, turn, None))
        if admitted.is_new:
            return reply(Fold(turn.turn_id, turn.conversation_id, self._model).response())
        return reply(await self._load_stored(turn))

    async def retrieve(self, request: ApiRequest[ResponseQuery, None]) -> ASGIApp:
        """`GET /v1/responses/{response_id}`."""
        turn = await self._find(request)
        if not request.query.stream:
            return reply(await self._load_stored(turn))
        after = None if request.query.starting_after is UNSET else request.query.starting_after
        if after is not None and turn.first_seq is None:
            problem = "the events of this response are no longer kept: get it without `stream`, or from its start"
            raise InvalidFrame(problems=[Problem("query.starting_after", problem)])
        return self._sessions.streaming(request, self._stream(request, turn, after))

    async def cancel(self, request: AnyApiRequest) -> ASGIApp:
        """`POST /v1/responses/{response_id}/cancel`; a turn that does not end in time is answered as in progress."""
        turn = await self._find(request)
        with self._sessions.waiting(request):
            await self._node.cancel(turn.user_id, turn.conversation_id, turn.turn_id)
            await request.while_connected(wait_stopped(self._node, turn, within_seconds=CANCEL_SECONDS))
            return reply(await self._load_stored(turn))

    async def models(self, request: AnyApiRequest) -> ASGIApp:
        """`GET /v1/models`."""
        return reply(Models([Model(self._model)]))

    async def model(self, request: AnyApiRequest) -> ASGIApp:
        """`GET /v1/models/{model}`."""
        if request.texts["model"] != self._model:
            raise NotFound("There is no such model.")
        return reply(Model(self._model))

    async def _find(self, request: AnyApiRequest) -> TurnRef:
        turn_id = turn_of(request.texts["response_id"])
        turn = None if turn_id is None else await self._node.conversations.find_turn(request.user_id, turn_id)
        if turn is None:
            raise NotFound(NO_RESPONSE)
        return turn

    async def _admit(self, request: ApiRequest[NoQuery, CreateResponse], key: str | None) -> Admitted:
        conversation_id = await self._find_conversation(request, key)
        frame = MessageSend(key or new_message_id(), request.body.question, conversation_id)
        return await self._node.send(request.user_id, frame, limits=request.identity.limits)

    async def _find_conversation(self, request: ApiRequest[NoQuery, CreateResponse], key: str | None) -> UUID | None:
        """Return the conversation that is to go on, None for a new one. Raises RoleOrder where it has gone on from the
        previous response already: there is one history, and no branch."""
        previous_id = request.body.previous_turn_id
        if previous_id is None:
            return request.body.conversation_id
        user_id, conversations = request.user_id, self._node.conversations
        previous = await conversations.find_turn(user_id, previous_id)
        if previous is None:
            raise NotFound(NO_RESPONSE)
        conversation_id = previous.conversation_id
        page = await conversations.messages(user_id, conversation_id, limit=1, before=None)
        if all(row["turn_id"] == previous_id for row in page.messages):
            return conversation_id
        # Or this is what it has gone on with, sent again.
        if key is not None and await conversations.find_sent(user_id, key) is not None:
            return conversation_id
        raise RoleOrder(
            "The conversation has gone on since that response: name the conversation, to go on from its end.",
            conversation_id=conversation_id,
        )

    async def _load_stored(self, turn: TurnRef) -> ResponseObject:
        return stored_response(await self._node.turns.stored(turn), self._model)

    async def _answer(self, request: AnyApiRequest, turn: TurnRef, key: str | None) -> ASGIApp:
        """Wait for the end of a response. What goes wrong with waiting does not end it, so its ids are told."""
        try:
            await request.while_connected(wait_end(self._node, turn))
            response = await self._load_stored(turn)
            if response.status == "in_progress":
                raise TurnInterrupted
            return reply(response)
        except NotFound:
            raise  # it has been deleted
        except ClientError as error:
            error.message += f" The response goes on: get it as {response_id_of(turn.turn_id)}."
            return refusal(
                error,
                _retry_headers(key),
                conversation_id=turn.conversation_id,
                message_id=UNSET if key is None else key,
            )

    def _stream(self, request: AnyApiRequest, turn: TurnRef, after: int | None) -> ASGIApp:
        heartbeat_seconds = self._settings.heartbeat_seconds
        return response_stream(self._node, request, turn, after, self._model, heartbeat_seconds=heartbeat_seconds)


def model_of(settings: Settings) -> str:
    """Return what the server's agent is called as a model."""
    if settings.agent == "openai":
        return settings.model
    return settings.agent.rpartition(":")[2]


def _idempotency_key(request: AnyApiRequest) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is not None and not is_client_id(key):
        problem = f"is not 1 to {ID_CHARACTERS_MAX} printable characters"
        raise InvalidFrame(problems=[Problem("Idempotency-Key", problem)])
    return key


def _retry_headers(key: str | None) -> dict[str, str]:
    """Return the header that tells stock clients whether to send again what has failed: without a key it would be
    another question."""
    return {"x-should-retry": "false" if key is None else "true"}
