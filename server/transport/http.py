"""Requests over HTTP: who asks, what they send, and every refusal in one shape. The APIs say what is done."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Generic, TypeAlias, TypeVar
from urllib.parse import parse_qsl
from uuid import UUID

import msgspec
from msgspec import UNSET, UnsetType
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from anynode.server.auth import Authenticator, Identity, bearer_of
from anynode.server.errors import (
    BodyTimeout,
    ClientError,
    InternalError,
    InvalidFrame,
    MessageTooLarge,
    NotFound,
    Problem,
    RateLimited,
    Unauthorized,
)
from anynode.server.protocol.bodies import Body, ErrorBody, NoQuery, Refusal, WrongPart
from anynode.server.protocol.decoding import decode_body, decode_query
from anynode.server.protocol.encoding import limit_fields
from anynode.server.protocol.frames import is_client_id
from anynode.server.transport.cut_short import CutShort, run_unless
from anynode.server.transport.paths import CONVERSATION, as_id, named, route_of
from anynode.server.transport.refusals import count_refusal
from anynode.server.transport.shares import Shares

logger = logging.getLogger("anynode.http")

BODY_SECONDS_MAX: Final = 30.0  # for a whole body to come
RETRY_SECONDS: Final = 1  # what 503 says in `Retry-After`
BREAK_OFF: Final = "anynode.break_off"  # in the scope: closes the connection
AnyQuery = TypeVar("AnyQuery", bound=Body)
AnyBody = TypeVar("AnyBody")
Result = TypeVar("Result")
# Given a user, an id of a conversation as it is written in a path, and the same as a UUID, if it is one: returns our id
# of the conversation. None: the user has none with that id, neither ours nor the client's own.
FindConversation: TypeAlias = Callable[[str, str, UUID | None], Awaitable[UUID | None]]


class ClientGone(Exception):
    """The client has closed its connection, so there is nobody to answer."""


@dataclass(frozen=True, slots=True)
class ApiRequest(Generic[AnyQuery, AnyBody]):
    """A request that has been authenticated and decoded.

    `ids` are the UUIDs in its path, by their names there, and `texts` what else its path names: ids that clients have
    given, and names of models. `revoked` is set when its token is revoked while it waits or streams.
    """

    identity: Identity
    ids: Mapping[str, UUID]
    texts: Mapping[str, str]
    query: AnyQuery
    body: AnyBody
    headers: Headers
    receive: Receive
    revoked: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def user_id(self) -> str:
        """The user who asks."""
        return self.identity.user_id

    @property
    def conversation_id(self) -> UUID:
        """The conversation in the path: our id of it, by whichever id the path names it."""
        return self.ids[CONVERSATION]

    async def wait_disconnected(self) -> None:
        """Wait until the client has gone."""
        while (await self.receive())["type"] != "http.disconnect":
            pass

    async def while_connected(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Return the result of `work`, which is cancelled when the client goes or its token is revoked. Raises
        ClientGone or Unauthorized."""
        try:
            return await run_unless(work, self.wait_disconnected(), self.revoked.wait())
        except CutShort:
            if self.revoked.is_set():
                raise Unauthorized("The token was revoked.") from None
            raise ClientGone from None


AnyApiRequest: TypeAlias = ApiRequest[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One operation of an API, as the server does it and as `/openapi.json` describes it.

    `handler` is given the API and the request. `bodies` are the kinds of body that the operation takes, and `decode`
    makes one of them of the bytes that came, or raises InvalidFrame. `replies` are the statuses of success with the
    kind of each body; `errors` are those beyond what every operation has.
    """

    method: str
    path: str
    name: str
    summary: str
    handler: Callable[[Any, Any], Awaitable[ASGIApp]]
    query: type[Body] = NoQuery
    bodies: Sequence[Any] = ()
    body_bytes_max: int | None = None  # None: as a frame
    replies: Mapping[int, Any]
    can_stream: bool = False  # a success may also be Server-Sent Events
    errors: Sequence[type[ClientError]] = ()
    decode: Callable[[bytes, Sequence[Any]], Any] = decode_body


def reply(body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a JSON answer."""
    all_headers = {"Cache-Control": "no-store", **(headers or {})}  # it is one user's
    return Response(msgspec.json.encode(body), status, all_headers, media_type="application/json")


def refusal(
    error: ClientError,
    headers: Mapping[str, str] | None = None,
    status: int | None = None,
    *,
    conversation_id: UUID | UnsetType = UNSET,
    message_id: str | UnsetType = UNSET,
) -> Response:
    """Return the answer that tells of an error, with the ids of what was admitted before it came."""
    count_refusal(error)
    all_headers = dict(headers or {})
    if isinstance(error, RateLimited):
        all_headers["Retry-After"] = str(math.ceil(error.retry_after_ms / 1000))
    elif error.http_status == 503:
        all_headers["Retry-After"] = str(RETRY_SECONDS)
    if error.http_status == 401:
        all_headers["WWW-Authenticate"] = "Bearer"
    problems = error.problems if isinstance(error, InvalidFrame) else ()
    details = [WrongPart(*problem) for problem in problems] or UNSET
    body = ErrorBody(error.code, error.message, details, conversation_id, message_id, **limit_fields(error))
    return reply(Refusal(body), status or error.http_status, all_headers)


def routes_of(
    apis: Sequence[tuple[Sequence[Operation], object]],
    authenticator: Authenticator,
    find_conversation: FindConversation,
    shares: Shares,
    *,
    body_bytes_max: int,
) -> list[BaseRoute]:
    """Return a route for each path of the operations of these APIs."""
    routes: list[BaseRoute] = []
    for operations, api in apis:
        by_path: dict[str, dict[str, Operation]] = {}
        for operation in operations:
            by_path.setdefault(operation.path, {})[operation.method] = operation
        for path, methods in by_path.items():
            resource = _Resource(methods, api, authenticator, find_conversation, shares, body_bytes_max)
            routes.append(route_of(path, resource))
    return routes


class _Resource:
    """The ASGI application behind one path."""

    def __init__(
        self,
        operations: Mapping[str, Operation],
        api: object,
        authenticator: Authenticator,
        find_conversation: FindConversation,
        shares: Shares,
        body_bytes_max: int,
    ) -> None:
        self._shares = shares
        self._find_conversation = find_conversation
        self._operations = operations
        self._api = api
        self._authenticator = authenticator
        self._body_bytes_max = body_bytes_max

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = await self._answer(scope, receive)
        except ClientGone:
            return
        except ClientError as error:
            response = refusal(error)
        except Exception:
            (path, *_) = (operation.path for operation in self._operations.values())  # not the client's own words
            logger.exception("%s %s failed", scope["method"], path)
            response = refusal(InternalError())
        await response(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive) -> ASGIApp:
        method = scope["method"]
        operation = self._operations.get("GET" if method == "HEAD" else method)
        if operation is None:
            return method_not_allowed(method, self._operations)
        token = bearer_of(scope["headers"])
        if token is None:
            raise Unauthorized("There is no Authorization: Bearer header.")
        identity = await self._authenticator.authenticate(token)
        ids, texts = named(scope["path_params"], identity)
        query = _query(scope, operation.query)
        headers = Headers(scope=scope)
        body = None
        if operation.bodies:
            body = await self._read_body(identity.user_id, operation, headers, receive)
            self._authenticator.check(identity)  # it may have taken half a minute
        request = ApiRequest(identity, ids, texts, query, body, headers, receive)
        if CONVERSATION in scope["path_params"]:
            return await self._answer_in(scope["path_params"][CONVERSATION], operation, request)
        return await operation.handler(self._api, request)

    async def _read_body(self, user_id: str, operation: Operation, headers: Headers, receive: Receive) -> Any:
        """Read and decode a body. Its bytes count towards the user's share until it is decoded. Raises MessageTooLarge,
        RateLimited, BodyTimeout, InvalidFrame or ClientGone."""
        bytes_max = operation.body_bytes_max or self._body_bytes_max
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > bytes_max:
            raise MessageTooLarge(f"The body is longer than {bytes_max} bytes.")
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS_MAX):
                is_more = True
                while is_more:
                    piece, is_more = await _piece_of_body(receive)
                    self._shares.reading.take(user_id, len(piece))
                    body += piece
                    if len(body) > bytes_max:
                        raise MessageTooLarge(f"The body is longer than {bytes_max} bytes.")
            return await self._shares.decoding.decode(
                user_id, bytes(body), lambda data: operation.decode(data, operation.bodies)
            )
        except TimeoutError:
            raise BodyTimeout(f"the body did not come within {BODY_SECONDS_MAX:g} seconds") from None
        finally:
            self._shares.reading.give_back(user_id, len(body))

    async def _answer_in(self, text: str, operation: Operation, request: AnyApiRequest) -> ASGIApp:
        """Do an operation on the conversation that a path names, by our id of it or else by the client's own.

        A UUID is taken for ours, without another statement. A client's own id may look like a UUID, so where nothing is
        found under it, it is looked up. An operation that raises NotFound has done nothing yet. Raises NotFound.
        """
        if not is_client_id(text):
            raise NotFound
        ours = as_id(text)
        if ours is None:
            found = await self._find_conversation(request.user_id, text, None)
        else:
            try:
                return await operation.handler(self._api, _in(ours, request))
            except NotFound:
                found = await self._find_conversation(request.user_id, text, ours)
                if found == ours:
                    raise  # it is something in the conversation that was not found
        if found is None:
            raise NotFound
        return await operation.handler(self._api, _in(found, request))


def _in(conversation_id: UUID, request: AnyApiRequest) -> AnyApiRequest:
    return replace(request, ids={**request.ids, CONVERSATION: conversation_id})


async def _piece_of_body(receive: Receive) -> tuple[bytes, bool]:
    """Return the next piece of a body, and whether more are to come. Raises ClientGone."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientGone
    return message.get("body", b""), message.get("more_body", False)


def _query(scope: Scope, kind: type[Body]) -> Any:
    text = scope["query_string"]
    try:
        parameters = parse_qsl(text.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=100)
    except ValueError:
        raise InvalidFrame(problems=[Problem("query", "cannot be read")]) from None
    return decode_query(parameters, kind)


async def break_off(scope: Scope, request: AnyApiRequest) -> None:
    """End a response that has begun as if the network had failed: its client must not take it for whole.

    `serve` puts the means into the scope. Another ASGI server closes the connection by itself, as it finds the response
    unfinished.
    """
    close: Callable[[], None] | None = scope.get(BREAK_OFF)
    if close is not None:
        close()
        await request.wait_disconnected()


async def no_content(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with 204 and no body."""
    await send({"type": "http.response.start", "status": 204, "headers": [(b"cache-control", b"no-store")]})
    await send({"type": "http.response.body", "body": b""})


def method_not_allowed(method: str, allowed: Mapping[str, object]) -> Response:
    """Return the refusal of a method that nothing is done with here."""
    listed = ", ".join(dict.fromkeys([*allowed, *(["HEAD"] if "GET" in allowed else [])]))
    error = InvalidFrame(f"{method} is not allowed here; allowed: {listed}")
    return refusal(error, {"Allow": listed}, 405)


async def refuse_route(request: Request, error: Exception) -> Response:
    """Return one of Starlette's own refusals in our shape: no such route, or not with this method."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        return method_not_allowed(request.method, dict.fromkeys(filter(None, allowed.split(", "))))
    return refusal(NotFound("There is no such route."), status=error.status_code)
