"""Authentication: the three transports, origins, deadlines, renewal and expiry, over real sockets."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jwt
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from tests.agents.scripted import eventually
from tests.conftest import StartNode
from tests.kit.harness import Frame, NodeProcess, Socket, running_node, socket_to, token_for
from tests.kit.rest import rest_to

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


def auth(token: str) -> Frame:
    return {"type": "auth", "token": token}


async def answers(socket: Socket) -> bool:
    """Whether the connection lives: a ping is answered with a pong."""
    request_id = secrets.token_hex(4)
    await socket.send({"type": "ping", "request_id": request_id})
    while (frame := await socket.receive())["type"] != "pong":
        pass
    return bool(frame == {"type": "pong", "request_id": request_id})


async def close_code_after_reading(socket: Socket) -> int:
    """How the node ends the connection, for a client that goes on reading until then."""
    async with asyncio.timeout(20):
        try:
            while True:
                await socket.connection.recv()
        except ConnectionClosed:
            pass
    return await socket.closed()


async def close_code(node: NodeProcess, **arguments: Any) -> int:
    """How the node ends a connection that is opened like this."""
    async with socket_to(node, ready=False, **arguments) as socket:
        return await socket.closed()


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


# The three transports.


async def test_a_token_in_the_header_is_welcomed(shared_node: NodeProcess, user: str) -> None:
    async with socket_to(shared_node, ready=False, headers=bearer(token_for(user))) as socket:
        ready = await socket.receive()
        assert ready.pop("node_id")
        assert ready == {"type": "ready", "user_id": user, "protocol": "anynode.v1", "heartbeat_seconds": 10.0}


async def test_a_token_among_the_subprotocols_is_welcomed(shared_node: NodeProcess, user: str) -> None:
    offered = ["anynode.v1", f"bearer.{token_for(user)}"]
    async with socket_to(shared_node, ready=False, subprotocols=offered) as socket:
        assert (await socket.receive())["user_id"] == user


async def test_a_token_in_the_first_frame_is_welcomed(shared_node: NodeProcess, user: str) -> None:
    async with socket_to(shared_node, ready=False) as socket:
        await socket.send(auth(token_for(user)))
        assert (await socket.receive())["user_id"] == user


@pytest.mark.parametrize("token_comes_first", [False, True])
async def test_only_the_protocol_is_selected_of_what_was_offered(
    shared_node: NodeProcess, user: str, token_comes_first: bool
) -> None:
    offered = ["anynode.v1", "other", f"bearer.{token_for(user)}"]
    async with socket_to(
        shared_node, ready=False, subprotocols=offered[::-1] if token_comes_first else offered
    ) as socket:
        assert socket.connection.subprotocol == "anynode.v1"


async def test_no_subprotocol_is_selected_where_ours_was_not_offered(shared_node: NodeProcess, user: str) -> None:
    async with socket_to(shared_node, ready=False, subprotocols=[f"bearer.{token_for(user)}"]) as socket:
        assert socket.connection.subprotocol is None


async def test_a_client_without_subprotocols_is_served(shared_node: NodeProcess, user: str) -> None:
    async with socket_to(shared_node, user, subprotocols=()) as socket:
        assert (await socket.answer("hello"))[-1]["type"] == "turn.completed"


async def test_a_token_in_the_query_string_is_not_accepted(shared_node: NodeProcess, user: str) -> None:
    token = token_for(user)
    url = f"{shared_node.ws}/ws?token={token}&access_token={token}&authorization=Bearer%20{token}"
    async with connect(url, proxy=None) as connection:
        socket = Socket(connection)
        await socket.send({"type": "ping"})
        assert (await socket.receive())["code"] == "unauthorized"
    assert token not in shared_node.log.read_text()


# What is refused.


@pytest.mark.parametrize(
    "token",
    [
        pytest.param("junk", id="junk"),
        pytest.param(token_for("ada", ttl_seconds=-1), id="expired"),
        pytest.param(token_for("ada", secret=secrets.token_urlsafe(48)), id="foreign secret"),
        pytest.param(jwt.encode({"sub": "ada"}, "", algorithm="none"), id="unsigned"),
        pytest.param(token_for(""), id="nobody"),
        pytest.param(token_for("x" * 256), id="sub too long"),
    ],
)
@pytest.mark.parametrize("transport", ["header", "subprotocol", "frame"])
async def test_a_bad_token_closes_with_3000(shared_node: NodeProcess, transport: str, token: str) -> None:
    match transport:
        case "header":
            assert await close_code(shared_node, headers=bearer(token)) == 3000
        case "subprotocol":
            assert await close_code(shared_node, subprotocols=["anynode.v1", f"bearer.{token}"]) == 3000
        case _:
            async with socket_to(shared_node, ready=False) as socket:
                await socket.send(auth(token))
                assert await socket.closed() == 3000


async def test_a_token_for_another_audience_closes_with_3000(shared_node: NodeProcess, start_node: StartNode) -> None:
    node = start_node(JWT_AUDIENCE="elsewhere")
    assert await close_code(node, headers=bearer(token_for("ada"))) == 3000


async def test_a_bad_header_is_not_mended_by_a_good_subprotocol(shared_node: NodeProcess, user: str) -> None:
    offered = ["anynode.v1", f"bearer.{token_for(user)}"]
    assert await close_code(shared_node, headers=bearer("junk"), subprotocols=offered) == 3000


# Origins.


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://[", "https://allowed.example.evil.example", "file://"]
)
async def test_a_foreign_origin_closes_with_3003(shared_node: NodeProcess, user: str, origin: str) -> None:
    assert await close_code(shared_node, headers={"Origin": origin, **bearer(token_for(user))}) == 3003


async def test_the_servers_own_origin_passes(shared_node: NodeProcess, user: str) -> None:
    async with socket_to(shared_node, user, headers={"Origin": shared_node.http}) as socket:
        assert await answers(socket)


async def test_another_port_of_the_same_host_is_foreign(shared_node: NodeProcess, user: str) -> None:
    headers = {"Origin": "http://127.0.0.1:1", **bearer(token_for(user))}
    assert await close_code(shared_node, headers=headers) == 3003


async def test_allowed_origins_pass_and_no_others(start_node: StartNode, user: str) -> None:
    node = start_node(ALLOWED_ORIGINS="https://one.example, https://two.example:8443")
    for origin in ("https://one.example", "https://two.example:8443", "HTTPS://One.example"):
        async with socket_to(node, user, headers={"Origin": origin}) as socket:
            assert await answers(socket)
    for origin in ("https://two.example", "http://one.example", "https://one.example:8443"):
        assert await close_code(node, headers={"Origin": origin, **bearer(token_for(user))}) == 3003


# The first frame.


async def test_silence_closes_with_3008_after_10_seconds(shared_node: NodeProcess) -> None:
    async with socket_to(shared_node, ready=False) as socket:
        assert await socket.closed(within_seconds=20) == 3008


@pytest.mark.parametrize(
    ("first", "code"),
    [
        ({"type": "ping", "request_id": "r"}, "unauthorized"),
        ({"type": "message.send", "message_id": "m", "content": "c", "request_id": "r"}, "unauthorized"),
        ({"type": "auth", "request_id": "r"}, "invalid_frame"),
    ],
)
async def test_a_wrong_first_frame_is_an_error_and_the_connection_lives(
    shared_node: NodeProcess, user: str, first: Frame, code: str
) -> None:
    async with socket_to(shared_node, ready=False) as socket:
        await socket.send(first)
        error = await socket.receive()
        assert (error["type"], error["code"], error["request_id"]) == ("error", code, "r")
        await socket.send(auth(token_for(user)))
        assert (await socket.receive())["type"] == "ready"


async def test_a_message_before_authentication_is_not_admitted_later(shared_node: NodeProcess, user: str) -> None:
    async with socket_to(shared_node, ready=False) as socket:
        await socket.ask("too early")
        assert (await socket.receive())["code"] == "unauthorized"
        await socket.send(auth(token_for(user)))
        await socket.until("ready")
        assert await answers(socket)
    assert json.loads(shared_node.get("/conversations", user=user)[1])["conversations"] == []


async def test_a_binary_first_frame_closes_with_1003(shared_node: NodeProcess) -> None:
    async with socket_to(shared_node, ready=False) as socket:
        await socket.connection.send(b"{}")
        assert await socket.closed() == 1003


async def test_a_flood_of_frames_before_authentication_is_cut_off(shared_node: NodeProcess) -> None:
    async with socket_to(shared_node, ready=False) as socket:
        ending = asyncio.create_task(close_code_after_reading(socket))
        try:
            for _ in range(2000):
                await socket.send({"type": "ping"})
        except ConnectionClosed:
            pass
        assert await ending == 1008


# Expiry and renewal.


async def test_a_token_that_soon_runs_out_is_warned_of_at_once(shared_node: NodeProcess, user: str) -> None:
    token = token_for(user, ttl_seconds=30)
    expires_at = jwt.decode(token, options={"verify_signature": False})["exp"]
    async with socket_to(shared_node, token=token) as socket:
        assert await socket.receive() == {"type": "auth.expiring", "expires_at": expires_at}


async def test_a_token_that_lasts_is_not_warned_of(shared_node: NodeProcess, user: str) -> None:
    async with socket_to(shared_node, token=token_for(user, ttl_seconds=90)) as socket:
        await socket.send({"type": "ping"})
        assert await socket.receive() == {"type": "pong"}


async def test_the_connection_closes_with_3000_when_its_token_runs_out(shared_node: NodeProcess, user: str) -> None:
    token = token_for(user, ttl_seconds=2)
    async with socket_to(shared_node, token=token) as socket:
        assert (await socket.receive())["type"] == "auth.expiring"
        assert await socket.closed() == 3000
    assert time.time() >= jwt.decode(token, options={"verify_signature": False, "verify_exp": False})["exp"] - 0.01


async def test_an_expired_connection_is_closed_in_the_middle_of_a_turn(start_node: StartNode, user: str) -> None:
    node = start_node(ECHO_TOKENS="100000", ECHO_TOKENS_PER_SECOND="100")
    async with socket_to(node, token=token_for(user, ttl_seconds=2)) as socket:
        await socket.ask("go on")
        await socket.until("turn.delta")
        assert await close_code_after_reading(socket) == 3000


async def test_a_newer_token_keeps_the_connection_past_the_old_expiry(shared_node: NodeProcess, user: str) -> None:
    old = token_for(user, ttl_seconds=2)
    async with (
        socket_to(shared_node, token=old) as renewed,
        socket_to(shared_node, token=old) as left_alone,
    ):
        await renewed.send(auth(token_for(user)))
        assert [frame["type"] for frame in await renewed.until("ready")] == ["auth.expiring", "ready"]
        # The other connection shows when the old token's time has come.
        assert await left_alone.closed() == 3000
        assert await answers(renewed)


async def test_a_renewed_connection_is_warned_before_its_new_end(shared_node: NodeProcess, user: str) -> None:
    newer = token_for(user, ttl_seconds=3)
    async with socket_to(shared_node, user) as socket:
        await socket.send(auth(newer))
        frames = await socket.until("auth.expiring")
        assert frames[-1]["expires_at"] == jwt.decode(newer, options={"verify_signature": False})["exp"]
        assert await socket.closed() == 3000


async def test_a_renewal_keeps_what_is_followed(shared_node: NodeProcess, user: str) -> None:
    async with socket_to(shared_node, user) as follower, socket_to(shared_node, user) as other:
        conversation_id = (await follower.answer("one"))[0]["conversation_id"]
        await follower.send(auth(token_for(user)))
        await follower.until("ready")
        await other.answer("two", conversation_id)
        assert (await follower.until("turn.completed"))[0]["message"]["content"] == "two"


async def test_another_users_token_closes_with_3003(shared_node: NodeProcess, user: str) -> None:
    async with socket_to(shared_node, user) as socket:
        await socket.send(auth(token_for(user + "-not")))
        assert await socket.closed() == 3003


async def test_a_bad_token_for_renewal_is_an_error_and_the_connection_lives(
    shared_node: NodeProcess, user: str
) -> None:
    async with socket_to(shared_node, user) as socket:
        await socket.send(auth(token_for(user, ttl_seconds=-1)))
        error = await socket.receive()
        assert (error["type"], error["code"], error["retryable"]) == ("error", "unauthorized", False)
        assert await answers(socket)


async def test_a_bad_renewal_does_not_put_off_the_end(shared_node: NodeProcess, user: str) -> None:
    async with socket_to(shared_node, token=token_for(user, ttl_seconds=2)) as socket:
        await socket.send(auth("junk"))
        assert (await socket.until("error"))[-1]["code"] == "unauthorized"
        assert await socket.closed() == 3000


# An issuer with public keys.

KEYS: dict[str, PrivateKey] = {
    "rsa": rsa.generate_private_key(65537, 2048),
    "curve": ec.generate_private_key(ec.SECP256R1()),
}
STRANGER = ec.generate_private_key(ec.SECP256R1())


def issued(key: PrivateKey, kid: str, user: str) -> str:
    now = int(time.time())
    claims = {"sub": user, "aud": "anynode", "iss": "anynode", "iat": now, "exp": now + 3600}
    algorithm = "RS256" if isinstance(key, rsa.RSAPrivateKey) else "ES256"
    return jwt.encode(claims, key, algorithm=algorithm, headers={"kid": kid})


def public_entry(kid: str, key: PrivateKey) -> dict[str, Any]:
    if isinstance(key, rsa.RSAPrivateKey):
        return {**RSAAlgorithm.to_jwk(key.public_key(), as_dict=True), "kid": kid}
    return {**ECAlgorithm.to_jwk(key.public_key(), as_dict=True), "kid": kid}


@pytest.fixture
async def issuer() -> AsyncIterator[SimpleNamespace]:
    """A real HTTP server that publishes the public keys while `is_open`, at `url`."""
    state = SimpleNamespace(is_open=True)

    async def keys(request: web.Request) -> web.Response:
        if not state.is_open:
            return web.Response(status=503)
        return web.json_response({"keys": [public_entry(kid, key) for kid, key in KEYS.items()]})

    application = web.Application()
    application.router.add_get("/jwks", keys)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    state.url = f"http://127.0.0.1:{runner.addresses[0][1]}/jwks"
    yield state
    await runner.cleanup()


async def test_a_node_without_keys_is_not_ready_and_tells_clients_to_come_back(
    database_url: str, tmp_path: Path, issuer: SimpleNamespace, user: str
) -> None:
    issuer.is_open = False
    settings = {"JWT_JWKS_URL": issuer.url, "JWT_SECRET": ""}
    token = issued(KEYS["curve"], "curve", user)
    starting = running_node(database_url, tmp_path, settings, until="/livez")
    node = await asyncio.to_thread(starting.__enter__)  # the keys are served by this very loop
    try:
        status, body = await asyncio.to_thread(node.get, "/readyz")
        assert (status, json.loads(body)["status"]) == (503, "keys_unavailable")
        assert await close_code(node, headers=bearer(token)) == 1013
        async with socket_to(node, ready=False) as socket:
            await socket.send(auth(token))
            assert await socket.closed() == 1013
        async with rest_to(node, None, token=token) as rest:
            reply = await rest.get("/conversations")
            assert reply.refusal == (503, "keys_unavailable")
            assert reply.headers["Retry-After"]
            issuer.is_open = True

            async def is_ready() -> bool:  # nobody comes with a token: the node asks by itself
                return (await rest.get("/readyz")).status == 200

            await eventually(is_ready)
            assert (await rest.get("/conversations")).status == 200
    finally:
        await asyncio.to_thread(starting.__exit__, None, None, None)


async def test_tokens_of_an_issuer_are_verified_with_its_public_keys(
    start_node: StartNode, issuer: SimpleNamespace, user: str
) -> None:
    node = await asyncio.to_thread(start_node, JWT_JWKS_URL=issuer.url, JWT_SECRET="")  # it fetches keys from this loop
    for kid, key in KEYS.items():  # RS256 and ES256
        async with socket_to(node, token=issued(key, kid, user)) as socket:
            assert (await socket.answer("hello"))[-1]["type"] == "turn.completed"
    assert await close_code(node, headers=bearer(issued(STRANGER, "curve", user))) == 3000
    assert await close_code(node, headers=bearer(issued(STRANGER, "stranger", user))) == 3000
    assert await close_code(node, headers=bearer(issued(KEYS["curve"], "rsa", user))) == 3000
