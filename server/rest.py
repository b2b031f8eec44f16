"""Conversations over HTTP: so far the list of them, newest activity first."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from models.conversations import list_conversations
from models.database import Database, Unavailable
from server.auth import Authenticator, Identity, bearer_of
from server.errors import ClientError, DatabaseUnavailable, InvalidFrame, Unauthorized

Answer = Callable[[Request, Identity], Awaitable[object]]


def rest_routes(database: Database, authenticator: Authenticator) -> list[Route]:
    """`GET /conversations`."""

    def route(path: str, answer: Answer) -> Route:
        async def endpoint(request: Request) -> Response:
            try:
                token = bearer_of(request.scope["headers"])
                if token is None:
                    raise Unauthorized("There is no Authorization: Bearer header.")
                body, status = await answer(request, await authenticator.authenticate(token)), 200
            except Unavailable:
                body, status = _error_body(DatabaseUnavailable()), DatabaseUnavailable.http_status
            except ClientError as error:
                body, status = _error_body(error), error.http_status
            return Response(msgspec.json.encode(body), status, media_type="application/json")

        return Route(path, endpoint, methods=["GET"])

    async def conversations(request: Request, identity: Identity) -> object:
        limit = _whole(request, "limit", 20, 1, 100)
        skip = _whole(request, "skip", 0, 0, 1_000_000)
        rows = await list_conversations(database, identity.user_id, limit=limit + 1, skip=skip)
        listed = [dict(row) for row in rows[:limit]]
        return {"conversations": listed, "next_skip": skip + limit if len(rows) > limit else None}

    return [route("/conversations", conversations)]


def _error_body(error: ClientError) -> object:
    return {"error": {"code": error.code, "message": error.message}}


def _whole(request: Request, name: str, default: int, low: int, high: int) -> int:
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10 and low <= int(text) <= high):
        raise InvalidFrame(f"{name} is a whole number from {low} to {high}")
    return int(text)
