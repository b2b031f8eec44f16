"""Requests over HTTP: who asks, what a path and a body may hold, and every refusal in one shape; without a server."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any, cast
from uuid import UUID

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Router
from starlette.types import ASGIApp, Message

from anynode.server.auth import Authenticator, Identity
from anynode.server.errors import (
    HTTP_ERRORS,
    ClientError,
    Draining,
    InvalidFrame,
    NotFound,
    Problem,
    RateLimited,
    Unauthorized,
)
from anynode.server.protocol.bodies import Body, Cancel
from anynode.server.settings import Settings
from anynode.server.transport import http as module
from anynode.server.transport.http import (
    BREAK_OFF,
    ApiRequest,
    ClientGone,
    Operation,
    break_off,
    method_not_allowed,
    no_content,
    refusal,
    refuse_route,
    reply,
    routes_of,
)
from anynode.server.transport.shares import ReadBytes, Shares
from tests.kit.asgi import WAIT_SECONDS_MAX, Peer, answered, body_of, http_scope
from tests.kit.turns import USER, request_of

ID = UUID("0199aa10-5f3e-7c51-9b1d-2f5b6f0a7c11")
OTHER = UUID(int=2)
TOKEN = {"Authorization": "Bearer good"}
BODY_BYTES_MAX = 100
GONE: Message = {"type": "http.disconnect"}


class Tokens:
    """Knows two users' tokens."""

    is_revoked = False

    async def authenticate(self, token: str) -> Identity:
        users = {"good": USER, "other": "user-2"}
        if token not in users:
            raise Unauthorized("the token is malformed")
        return Identity(users[token], 4e9)

    def check(self, identity: Identity) -> None:
        if self.is_revoked:
            raise Unauthorized("the token was revoked")


class Query(Body, frozen=True):
    """How often to say it."""

    times: int = 1


class Api:
    """Says what it was asked."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.missing: set[UUID | None] = set()
        self.calls = 0

    async def read(self, request: ApiRequest[Any, Any]) -> ASGIApp:
        self.calls += 1
        if self.error is not None:
            raise self.error
        if request.ids.get("conversation_id") in self.missing:
            raise NotFound("There is no such thing.")
        ids = {name: str(id) for name, id in request.ids.items()}
        return reply({"user": request.user_id, "ids": ids, "texts": request.texts, "times": request.query.times})

    async def write(self, request: ApiRequest[Any, Any]) -> ASGIApp:
        return reply({"body": request.body}, 201)


def decode_text(data: bytes, kinds: Sequence[Any]) -> dict[str, Any]:
    return {"text": data.decode(), "thread": threading.get_ident()}


def operation(method: str, path: str, **fields: Any) -> Operation:
    handler = Api.write if method == "POST" else Api.read
    return Operation(
        method=method, path=path, name="test", summary="A test.", handler=handler, replies={200: None}, **fields
    )


class Served:
    """Operations, served."""

    def __init__(self) -> None:
        self.api = Api()
        operations = (
            operation("GET", "/things/{thing_id}", query=Query),
            operation("POST", "/things/{thing_id}", bodies=(Cancel,)),
            operation("POST", "/texts", bodies=(str,), decode=decode_text),
            operation("POST", "/long", bodies=(str,), decode=decode_text, body_bytes_max=100_000),
            operation("GET", "/models/{model}", query=Query),
            operation("GET", "/users/{user_id}/things", query=Query),
            operation("GET", "/conversations/{conversation_id}", query=Query),
            operation("GET", "/conversations/{conversation_id}/things/{thing_id}", query=Query),
        )
        apis = [(operations, self.api)]
        self.found: dict[str, UUID] = {}  # the conversations that are there, by their ids in a path
        self.looked_up: list[tuple[str, str, UUID | None]] = []
        tokens = cast(Authenticator, Tokens())
        self.shares = Shares(Settings())
        routes = routes_of(apis, tokens, self.find_conversation, self.shares, body_bytes_max=BODY_BYTES_MAX)
        self.app = Router(routes)

    async def find_conversation(self, user_id: str, text: str, id: UUID | None) -> UUID | None:
        self.looked_up.append((user_id, text, id))
        return self.found.get(text)

    async def ask(
        self, method: str, path: str, *said: Message, headers: Mapping[str, str] = TOKEN, query: str = ""
    ) -> Peer:
        return await answered(self.app, http_scope(method, path, headers=headers, query=query), *said)


@pytest.fixture
def served() -> Served:
    return Served()


# Who asks, and for what.


async def test_a_request_is_answered_with_what_it_was_decoded_to(served: Served) -> None:
    peer = await served.ask("GET", f"/things/{ID}", query="times=3")
    assert (peer.status, peer.is_whole) == (200, True)
    assert peer.json == {"user": USER, "ids": {"thing_id": str(ID)}, "texts": {}, "times": 3}
    assert peer.headers["cache-control"] == "no-store"
    assert peer.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({}, "There is no Authorization: Bearer header."),
        ({"Authorization": "Basic good"}, "The Authorization header must be `Bearer` and a token."),
        ({"Authorization": "Bearer bad"}, "the token is malformed"),
    ],
)
async def test_a_request_without_a_good_token_is_refused(
    served: Served, headers: Mapping[str, str], message: str
) -> None:
    peer = await served.ask("GET", f"/things/{ID}", headers=headers)
    assert peer.status == 401
    assert peer.headers["www-authenticate"] == "Bearer"
    assert peer.json == {"error": {"code": "unauthorized", "message": message}}


async def test_a_token_that_is_revoked_while_its_body_comes_does_nothing(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokens, "is_revoked", True)
    assert (await served.ask("GET", f"/things/{ID}")).status == 200  # there is no body, and it was looked at already
    peer = await served.ask("POST", "/texts", *body_of(b'"text"'))
    assert (peer.status, peer.json["error"]["message"]) == (401, "the token was revoked")


async def test_a_head_request_is_answered_as_a_get(served: Served) -> None:
    assert (await served.ask("HEAD", f"/things/{ID}")).status == 200
    peer = await served.ask("HEAD", "/texts")
    assert peer.status == 405


async def test_a_method_that_does_nothing_is_refused_with_those_that_do(served: Served) -> None:
    peer = await served.ask("DELETE", f"/things/{ID}")
    assert (peer.status, peer.headers["allow"]) == (405, "GET, POST, HEAD")
    assert peer.json["error"]["code"] == "invalid_frame"
    assert peer.json["error"]["message"] == "DELETE is not allowed here; allowed: GET, POST, HEAD"
    assert method_not_allowed("GET", {"POST": None}).headers["allow"] == "POST"


async def test_an_id_that_is_no_uuid_is_refused_with_its_place(served: Served) -> None:
    peer = await served.ask("GET", "/things/17")
    assert peer.status == 422
    assert peer.json["error"]["details"] == [{"path": "thing_id", "message": "is not a UUID"}]


async def test_what_others_have_named_may_have_slashes_in_it_and_must_be_printable(served: Served) -> None:
    assert (await served.ask("GET", "/models/org/model-1")).json["texts"] == {"model": "org/model-1"}
    for name in ("a\nb", "x" * 129):
        peer = await served.ask("GET", f"/models/{name}")
        assert peer.status == 422
        problem = {"path": "model", "message": "is not 1 to 128 printable characters"}
        assert peer.json["error"]["details"] == [problem]


async def test_a_path_with_another_users_id_is_forbidden(served: Served) -> None:
    assert (await served.ask("GET", f"/users/{USER}/things")).json["texts"] == {}
    peer = await served.ask("GET", "/users/user-2/things")
    assert (peer.status, peer.json["error"]["code"]) == (403, "forbidden")


@pytest.mark.parametrize("query", ["times=%ff", "&".join(f"a{number}=1" for number in range(101))])
async def test_a_query_that_cannot_be_read_is_refused(served: Served, query: str) -> None:
    peer = await served.ask("GET", f"/things/{ID}", query=query)
    assert peer.status == 422
    assert peer.json["error"]["details"] == [{"path": "query", "message": "cannot be read"}]


async def test_a_parameter_that_is_unknown_is_refused(served: Served) -> None:
    peer = await served.ask("GET", f"/things/{ID}", query="time=3")
    assert peer.status == 422
    assert peer.json["error"]["details"][0]["path"].startswith("query")


async def test_what_an_operation_raises_is_its_refusal(served: Served) -> None:
    served.api.error = Draining()
    peer = await served.ask("GET", f"/things/{ID}")
    assert (peer.status, peer.headers["retry-after"], peer.json["error"]["code"]) == (503, "1", "draining")


async def test_what_nobody_has_thought_of_is_an_internal_error_and_logged(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    served.api.error = KeyError("secret")
    with caplog.at_level(logging.ERROR):
        peer = await served.ask("GET", f"/things/{ID}")
    assert (peer.status, peer.json["error"]["code"]) == (500, "internal_error")
    assert b"secret" not in peer.body
    assert [record.message for record in caplog.records] == ["GET /things/{thing_id} failed"]


async def test_a_client_that_goes_before_its_answer_is_sent_none(served: Served) -> None:
    served.api.error = ClientGone()
    assert (await served.ask("GET", f"/things/{ID}")).sent == []


# Conversations, by our id or the client's own.


async def test_a_uuid_is_our_id_of_a_conversation_and_is_not_looked_up(served: Served) -> None:
    peer = await served.ask("GET", f"/conversations/{ID}/things/{OTHER}")
    assert peer.json["ids"] == {"conversation_id": str(ID), "thing_id": str(OTHER)}
    assert served.looked_up == []


async def test_any_other_text_is_the_clients_own_id_and_looked_up_first(served: Served) -> None:
    served.found["a/b"] = OTHER
    peer = await served.ask("GET", f"/conversations/a%2Fb/things/{ID}")
    assert peer.json["ids"] == {"conversation_id": str(OTHER), "thing_id": str(ID)}
    assert served.looked_up == [(USER, "a/b", None)]


@pytest.mark.parametrize("raw", ["%00", "a%0Ab", "%ff", "%ED%A0%80", "x" * 129, "%7F", "nobody's", str(OTHER)])
async def test_what_is_nobodys_id_is_not_found_whatever_it_is(served: Served, raw: str) -> None:
    served.api.missing = {OTHER}
    for path in (f"/conversations/{raw}", f"/conversations/{raw}/things/{ID}"):
        peer = await served.ask("GET", path)
        assert peer.status == 404
        assert peer.json == {"error": {"code": "not_found", "message": "There is no such conversation."}}
    assert {text for _, text, _ in served.looked_up} <= {"nobody's", str(OTHER)}


async def test_a_clients_own_id_may_look_like_ours(served: Served) -> None:
    served.api.missing, served.found = {OTHER}, {str(OTHER): ID}
    assert (await served.ask("GET", f"/conversations/{OTHER}")).json["ids"] == {"conversation_id": str(ID)}
    assert served.looked_up == [(USER, str(OTHER), OTHER)]


async def test_what_is_missing_in_a_conversation_that_is_there_is_said_to_be_missing(served: Served) -> None:
    served.api.missing, served.found = {OTHER}, {str(OTHER): OTHER}
    peer = await served.ask("GET", f"/conversations/{OTHER}")
    assert peer.json["error"]["message"] == "There is no such thing."
    assert served.api.calls == 1


async def test_other_errors_do_not_make_it_look_for_another_conversation(served: Served) -> None:
    served.api.error = Draining()
    assert (await served.ask("GET", f"/conversations/{OTHER}")).status == 503
    assert served.looked_up == []


# Bodies.


@pytest.mark.parametrize("pieces", [1, 3])
async def test_a_body_comes_in_any_number_of_pieces(served: Served, pieces: int) -> None:
    data = json.dumps({"turn_id": str(ID)}).encode()
    peer = await served.ask("POST", f"/things/{ID}", *body_of(data, pieces))
    assert (peer.status, peer.json) == (201, {"body": {"turn_id": str(ID)}})


async def test_a_body_that_is_not_what_the_operation_takes_is_refused(served: Served) -> None:
    peer = await served.ask("POST", f"/things/{ID}", *body_of(b'{"turn": 1}'))
    assert (peer.status, peer.json["error"]["code"]) == (422, "invalid_frame")


@pytest.mark.parametrize(("size", "status"), [(100, 201), (101, 413)])
@pytest.mark.parametrize("pieces", [1, 5])
async def test_a_body_may_have_as_many_bytes_as_a_frame(served: Served, size: int, status: int, pieces: int) -> None:
    peer = await served.ask("POST", "/texts", *body_of(b"x" * size, pieces))
    assert peer.status == status
    if status == 413:
        message = "The body is longer than 100 bytes."
        assert peer.json == {"error": {"code": "message_too_large", "message": message}}


async def test_an_operation_may_take_longer_bodies_than_others(served: Served) -> None:
    assert (await served.ask("POST", "/long", *body_of(b"x" * 100_000))).status == 201
    assert (await served.ask("POST", "/long", *body_of(b"x" * 100_001))).status == 413


@pytest.mark.parametrize("length", ["101", "9" * 10_000])
async def test_a_body_that_says_to_be_too_long_is_not_read(served: Served, length: str) -> None:
    headers = {**TOKEN, "Content-Length": length}
    assert (await served.ask("POST", "/texts", headers=headers)).status == 413  # without a word of its body


@pytest.mark.parametrize("length", ["-1", "many", "²"])
async def test_a_length_that_is_no_number_counts_for_nothing(served: Served, length: str) -> None:
    headers = {**TOKEN, "Content-Length": length}
    assert (await served.ask("POST", "/texts", *body_of(b"x"), headers=headers)).status == 201


async def test_a_body_that_does_not_come_in_time_is_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BODY_SECONDS_MAX", 0.0)
    peer = await served.ask("POST", "/texts")
    assert (peer.status, peer.json["error"]["code"]) == (408, "invalid_frame")
    assert peer.json["error"]["message"] == "the body did not come within 0 seconds"


async def test_a_client_that_goes_before_the_end_of_its_body_is_sent_nothing(served: Served) -> None:
    begun: Message = {"type": "http.request", "body": b"x", "more_body": True}
    assert (await served.ask("POST", "/texts", begun, GONE)).sent == []


async def test_bodies_are_bounded_for_each_user_and_together_and_those_that_are_over_count_no_more(
    served: Served,
) -> None:
    served.shares.reading = ReadBytes(150, 120)
    slow = Peer({"type": "http.request", "body": b"x" * 80, "more_body": True})
    scope = http_scope("POST", "/texts", headers=TOKEN)
    reading = asyncio.create_task(served.app(scope, slow.receive, slow.send))
    await slow.wait_heard()
    refused = await served.ask("POST", "/texts", *body_of(b"x" * 60))
    assert (refused.status, refused.headers["retry-after"]) == (429, "1")
    assert refused.json["error"]["limit"] == "read_bytes_per_user_max"
    assert (await served.ask("POST", "/texts", *body_of(b"x" * 40))).status == 201
    other = {"Authorization": "Bearer other"}
    assert (await served.ask("POST", "/texts", *body_of(b"x" * 70), headers=other)).status == 201
    refused = await served.ask("POST", "/texts", *body_of(b"x" * 71), headers=other)
    assert (refused.status, refused.json["error"]["limit"]) == (429, "read_bytes_max")
    slow.say(GONE)
    await reading
    assert served.shares.reading.total == 0
    for _ in range(3):
        assert (await served.ask("POST", "/texts", *body_of(b"x" * 60))).status == 201


async def test_nothing_is_read_of_a_body_before_its_sender_has_authenticated(served: Served) -> None:
    for headers in ({}, {"Authorization": "Bearer bad"}):
        peer = Peer()
        async with asyncio.timeout(WAIT_SECONDS_MAX):  # it waits for no body, as none is sent
            await served.app(http_scope("POST", "/texts", headers=headers), peer.receive, peer.send)
        assert peer.status == 401


@pytest.mark.parametrize("data", [b"x" * 101, b"{"])
async def test_the_bytes_of_a_body_that_is_refused_are_given_back(served: Served, data: bytes) -> None:
    path = "/texts" if len(data) > 1 else f"/things/{ID}"
    assert (await served.ask("POST", path, *body_of(data))).status in (413, 422)
    assert served.shares.reading.total == 0


async def test_a_long_body_is_decoded_beside_the_loop_and_a_short_one_at_once(served: Served) -> None:
    short = await served.ask("POST", "/long", *body_of(b"x" * 16_384))
    long = await served.ask("POST", "/long", *body_of(b"x" * 16_385))
    assert short.json["body"]["thread"] == threading.get_ident()
    assert long.json["body"]["thread"] != threading.get_ident()
    assert len(long.json["body"]["text"]) == 16_385


# Refusals.


@pytest.mark.parametrize("kind", HTTP_ERRORS)
def test_every_refusal_has_its_status_its_code_and_the_headers_that_belong_to_it(kind: type[ClientError]) -> None:
    response = refusal(kind())
    assert response.status_code == kind.http_status
    limits = {"retry_after_ms": 1000} if kind is RateLimited else {}
    assert json.loads(bytes(response.body)) == {"error": {"code": kind.code, "message": kind.__doc__, **limits}}
    assert response.headers["cache-control"] == "no-store"
    assert ("retry-after" in response.headers) == (kind.http_status in (429, 503))
    assert ("www-authenticate" in response.headers) == (kind.http_status == 401)


def test_a_refusal_tells_what_is_wrong_where_and_the_ids_of_what_was_admitted() -> None:
    error = InvalidFrame(problems=[Problem("messages[2].role", "is unknown"), Problem("", "is bad")])
    body = json.loads(bytes(refusal(error, {"X-A": "b"}, 400, conversation_id=ID, message_id="m-1").body))
    assert body == {
        "error": {
            "code": "invalid_frame",
            "message": "messages[2].role: is unknown; is bad",
            "details": [{"path": "messages[2].role", "message": "is unknown"}, {"path": "", "message": "is bad"}],
            "conversation_id": str(ID),
            "message_id": "m-1",
        }
    }
    response = refusal(NotFound(), {"X-A": "b"}, 400)
    assert (response.status_code, response.headers["x-a"]) == (400, "b")


async def test_a_route_that_is_not_there_is_refused_in_our_shape() -> None:
    request = Request(http_scope("GET", "/nowhere"))
    response = await refuse_route(request, HTTPException(404))
    assert response.status_code == 404
    assert json.loads(bytes(response.body)) == {"error": {"code": "not_found", "message": "There is no such route."}}
    response = await refuse_route(request, HTTPException(405, headers={"Allow": "POST, PUT"}))
    assert (response.status_code, response.headers["allow"]) == (405, "POST, PUT")


async def test_no_content_has_no_body() -> None:
    peer = await answered(no_content, http_scope("GET", "/"))
    assert (peer.status, peer.body, peer.is_whole) == (204, b"", True)


# A client that goes.


async def test_work_for_a_client_is_cancelled_when_it_goes() -> None:
    peer = Peer({"type": "http.request", "body": b""}, GONE)
    request, is_cancelled = request_of(peer), asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            is_cancelled.set()

    with pytest.raises(ClientGone):
        await request.while_connected(work())
    assert is_cancelled.is_set()


async def test_work_for_a_client_whose_token_is_revoked_is_refused() -> None:
    request = request_of(Peer())
    request.revoked.set()
    with pytest.raises(Unauthorized, match="revoked"):
        await request.while_connected(asyncio.Event().wait())


async def test_work_for_a_client_that_stays_gives_its_result() -> None:
    async def work() -> int:
        return 42

    assert await request_of(Peer()).while_connected(work()) == 42


async def test_a_response_is_broken_off_by_closing_its_connection() -> None:
    peer, closed = Peer(), asyncio.Event()

    def close() -> None:
        closed.set()
        peer.say(GONE)

    await break_off(http_scope("GET", "/", more={BREAK_OFF: close}), request_of(peer))
    assert closed.is_set()


async def test_another_server_breaks_an_unfinished_response_off_by_itself() -> None:
    await break_off(http_scope("GET", "/"), request_of(Peer()))


def test_the_kinds_of_answer_are_responses() -> None:
    assert isinstance(reply({}), Response)
    assert reply({}, 201, {"X-A": "b"}).status_code == 201
