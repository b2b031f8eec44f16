"""One user, or nobody at all, takes everything that a node lets them take; another user is served all the same."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager

import aiohttp
import pytest

from anynode.server.transport.allowance import FRAME_BYTES_BURST, FRAME_BYTES_PER_SECOND
from anynode.server.transport.shares import READ_BYTES_PER_USER_MAX
from tests.agents.scripted import eventually
from tests.kit.ai_sdk import chat_socket
from tests.kit.ai_sdk import question as ai_sdk_question
from tests.kit.harness import NodeProcess, Socket, running_node, socket_to, token_for
from tests.kit.rest import Reply, Rest, rest_to

PER_USER = 3
LIMITS = {
    "CONNECTIONS_MAX": "12",
    "CONNECTIONS_PER_USER_MAX": str(PER_USER),
    "UNAUTHENTICATED_MAX": "6",
    "UNAUTHENTICATED_PER_ADDRESS_MAX": "3",
    "TRUSTED_PROXIES": "127.0.0.1",
    "ECHO_TOKENS_PER_SECOND": "1",  # a turn that does not end meanwhile
}
REFUSED = {"limit": "connections_per_user_max", "limit_max": PER_USER, "retry_after_ms": 1000}


@pytest.fixture(scope="module")
def node(module_database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A node with small limits."""
    with running_node(module_database_url, tmp_path_factory.mktemp("node"), LIMITS) as node:
        yield node


@pytest.fixture
def other(user: str) -> str:
    """Another user."""
    return f"other-{user}"


async def sessions_of(node: NodeProcess) -> int:
    return int(await asyncio.to_thread(node.metric, "anynode_sessions"))


async def until_sessions(node: NodeProcess, count: int) -> None:
    async def is_reached() -> bool:
        return await sessions_of(node) == count

    await eventually(is_reached)


@asynccontextmanager
async def without_token(node: NodeProcess, address: str) -> AsyncIterator[Socket]:
    """A socket that does not authenticate, behind the proxy, from an address."""
    async with socket_to(node, headers={"X-Forwarded-For": address}, ready=False) as socket:
        yield socket


def error_of(reply: Reply) -> dict[str, object]:
    error = reply.json["error"]
    return {name: error.get(name) for name in REFUSED}


async def test_sockets_streams_and_waiting_requests_of_one_user_count_together(
    node: NodeProcess, user: str, other: str
) -> None:
    async with AsyncExitStack() as stack:
        rest = await stack.enter_async_context(rest_to(node, user))
        others = await stack.enter_async_context(rest_to(node, other))
        id, second = await rest.create(), await rest.create()
        await stack.enter_async_context(socket_to(node, user))
        await stack.enter_async_context(rest.events(id))
        waiting = asyncio.create_task(rest.proceed(id, "a question that is answered slowly"))
        await until_sessions(node, PER_USER)

        async with socket_to(node, ready=False, headers={"Authorization": f"Bearer {token_for(user)}"}) as socket:
            error = await socket.receive()
            assert await socket.closed() == 1013
        assert {name: error[name] for name in ("type", "code", "retryable", *REFUSED)} == {
            "type": "error",
            "code": "rate_limited",
            "retryable": True,
            **REFUSED,
        }
        async with chat_socket(node, user) as chat:
            assert await chat.closed() == (1013, error["message"])
        for reply in (
            await rest.get(f"/conversations/{second}/events"),
            await rest.proceed(second, "a"),
            await rest.post("/v1/responses", {"input": "a", "stream": True}),
            await rest.post("/api/chat", {"id": second, "messages": [ai_sdk_question("a")]}),
        ):
            assert reply.refusal == (429, "rate_limited")
            assert int(reply.headers["Retry-After"]) == 1
            assert error_of(reply) == REFUSED
        assert (await rest.get("/conversations")).status == 200  # what is answered at once does not count

        async with socket_to(node, other) as socket, others.events(await others.create()):
            await socket.send({"type": "ping"})
            assert (await socket.receive())["type"] == "pong"
            await until_sessions(node, PER_USER + 2)

        waiting.cancel()
        await asyncio.wait((waiting,))
        await until_sessions(node, PER_USER - 1)
        async with socket_to(node, user):
            await until_sessions(node, PER_USER)
    await until_sessions(node, 0)


async def test_what_is_open_is_given_back_in_every_way_to_leave(node: NodeProcess, user: str) -> None:
    async def leave_by(way: int, rest: Rest, id: str) -> None:
        match way:
            case 0:  # a closing handshake
                async with socket_to(node, user):
                    pass
            case 1:
                async with socket_to(node, user) as socket:
                    socket.drop()
            case 2:  # an error of the client's
                async with socket_to(node, user) as socket:
                    await socket.connection.send(b"binary")
                    assert await socket.closed() == 1003
            case 3:
                async with rest.events(id) as events:
                    events.drop()
            case 4:
                waiting = asyncio.create_task(rest.proceed(id, "slowly", if_busy="interrupt"))
                await until_sessions(node, 1)
                waiting.cancel()
                await asyncio.wait((waiting,))
            case 5:  # before it has authenticated
                async with without_token(node, "192.0.2.1") as socket:
                    socket.drop()
            case 6:
                async with chat_socket(node, user) as chat:
                    chat.drop()
            case _:  # it is refused: a stream of a conversation that is not there
                assert (await rest.get("/conversations/none/events")).status == 404

    async with rest_to(node, user) as rest:
        id = await rest.create()
        for number in range(200):
            await leave_by(number % 8, rest, id)
            if number % 8 == 7:
                await until_sessions(node, 0)

    async def all_have_gone() -> bool:
        return await asyncio.to_thread(node.metric, "anynode_connections") == 0

    await eventually(all_have_gone)
    async with AsyncExitStack() as stack:
        for _ in range(PER_USER):
            await stack.enter_async_context(socket_to(node, user))
        assert await sessions_of(node) == PER_USER


async def test_sockets_without_a_token_make_room_for_newer_ones_of_their_address_and_for_users(
    node: NodeProcess, user: str
) -> None:
    attacker = {"X-Forwarded-For": "198.51.100.1"}
    refused = 'anynode_refused_total{limit="unauthenticated_per_address_max"}'
    before = node.metric(refused)
    async with AsyncExitStack() as stack:
        others = [await stack.enter_async_context(without_token(node, f"192.0.2.{number}")) for number in (1, 2)]
        flood = []
        for _ in range(20):
            flood.append(await stack.enter_async_context(without_token(node, attacker["X-Forwarded-For"])))
            async with socket_to(node, user, headers=attacker):  # a user behind the same address gets in
                pass
        # The user takes the place of one, too, for the moment until it has authenticated: so the last two are left.
        assert [await socket.closed() for socket in flood[:18]] == [1013] * 18
        assert node.metric(refused) - before == 18
        for number, socket in enumerate((*others, *flood[18:])):
            await socket.send({"type": "auth", "token": token_for(f"{user}-{number}")})
            assert (await socket.receive())["type"] == "ready"


async def test_a_socket_without_a_token_that_makes_room_does_not_keep_its_connection(node: NodeProcess) -> None:
    """The peer answers no close frame, for which an ordinary socket is given five seconds."""
    key = base64.b64encode(bytes(16)).decode()
    head = f"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: {key}\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", node.port)
    try:
        writer.write(f"{head}Sec-WebSocket-Version: 13\r\nX-Forwarded-For: 192.0.2.77\r\n\r\n".encode())
        await reader.readuntil(b"\r\n\r\n")
        async with AsyncExitStack() as stack:
            for _ in range(3):
                await stack.enter_async_context(without_token(node, "192.0.2.77"))
            async with asyncio.timeout(4):
                closing = await reader.read()  # to the end of the connection
        assert closing[2:4] == (1013).to_bytes(2, "big")
    finally:
        writer.close()


async def test_beyond_all_addresses_the_one_that_has_waited_longest_makes_room(node: NodeProcess) -> None:
    async with AsyncExitStack() as stack:
        sockets = [await stack.enter_async_context(without_token(node, f"203.0.113.{number}")) for number in range(8)]
        assert [await socket.closed() for socket in sockets[:2]] == [1013, 1013]
        assert all(socket.connection.close_code is None for socket in sockets[2:])


async def test_bodies_that_one_user_holds_up_are_bounded_and_another_ones_passes(
    node: NodeProcess, user: str, other: str
) -> None:
    size = 4_194_304 - 100
    count = READ_BYTES_PER_USER_MAX // size
    assert count == 4

    async def hold(rest: Rest, path: str, sent: asyncio.Event, go_on: asyncio.Event) -> int:
        async def body() -> AsyncIterator[bytes]:
            yield b" " * size
            sent.set()
            await go_on.wait()
            yield b"x"  # no JSON

        headers = {"Authorization": f"Bearer {token_for(user)}"}
        async with rest.session.post(node.http + path, data=body(), headers=headers) as response:
            return response.status

    async with rest_to(node, user) as rest, rest_to(node, other) as others:
        path = f"/conversations/{await rest.create()}/messages"
        go_on, events = asyncio.Event(), [asyncio.Event() for _ in range(count)]
        held = [asyncio.create_task(hold(rest, path, sent, go_on)) for sent in events]
        await asyncio.gather(*(sent.wait() for sent in events))

        async def is_refused() -> bool:  # as soon as the node has read all of it
            reply = await rest.ask("POST", path, data=b" " * 600)
            return reply.status == 429 and reply.json["error"]["limit"] == "read_bytes_per_user_max"

        await eventually(is_refused)
        assert (await others.post("/conversations", {"title": "short"})).status == 201
        go_on.set()
        assert await asyncio.gather(*held) == [422] * count
        assert (await rest.ask("POST", path, data=b" " * 600)).status == 422


async def test_long_frames_of_one_user_are_bounded_over_all_sockets(node: NodeProcess, user: str, other: str) -> None:
    refused = 'anynode_refused_total{limit="frame_bytes_per_second"}'
    before = node.metric(refused)
    frame = {"type": "send", "requestId": "long", "trigger": "x" * 4_190_000}
    assert 2 * 4_190_000 < FRAME_BYTES_BURST < 3 * 4_190_000
    async with chat_socket(node, user) as first, chat_socket(node, user) as second, chat_socket(node, other) as others:
        said = []
        for socket in (first, second, first):
            await socket.send(frame)
            said.append(await socket.refused("long"))
        assert said[2] == f"More than {FRAME_BYTES_PER_SECOND} bytes of frames a second."
        assert said[2] not in said[:2]
        await others.send(frame)
        assert await others.refused("long") == said[0]
        await first.send({"type": "resume", "requestId": "short", "id": user})
        assert (await first.next("short"))["type"] == "no-active"
    assert node.metric(refused) - before == 1


async def test_nothing_is_read_of_a_body_without_a_token(node: NodeProcess) -> None:
    is_asked = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b"{"
        is_asked.set()
        await asyncio.Event().wait()

    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{node.http}/conversations", data=body()) as response,
    ):
        assert response.status == 401
