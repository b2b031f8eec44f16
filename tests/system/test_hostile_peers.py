"""Peers without a token cannot hold what they do not pay for: each bound, attacked over raw sockets."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from anynode.server.auth import TOKEN_CHARACTERS_MAX, make_token
from anynode.server.logs import LINES_MAX
from anynode.server.transport.bounded_websocket import FRAMES_BURST
from anynode.server.transport.peers import Peers
from tests.kit.harness import SECRET, NodeProcess, running_node, token_for
from tests.kit.listening import PATIENCE_SECONDS, RawSocket, connected, echo, frame, handshake, listening, raw_socket

LIMBO = ("Content-Length: 2", "Transfer-Encoding: chunked", "\r\n".join(f"X-{n}: x" for n in range(140)))
CANARY = "canary-e5b1"
GET = b"GET /livez HTTP/1.1\r\nHost: a\r\n"


@pytest.fixture(scope="module")
def node(module_database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A node that all tests of the module attack."""
    with running_node(module_database_url, tmp_path_factory.mktemp("node")) as node:
        yield node


def long_token(user: str, length: int = TOKEN_CHARACTERS_MAX) -> str:
    """A token of exactly this length, or up to two characters less."""
    # The length of the times in it is not the same in every token, so a token that is measured is used.
    for padding in range(3 * length // 4, 0, -1):
        token = make_token(
            SECRET, user_id=user, audience="anynode", issuer="anynode", ttl_seconds=3600, email="x" * padding
        )
        if length - 2 <= len(token) <= length:
            return token
    raise AssertionError


async def head_of(raw: RawSocket) -> bytes:
    """The head of the answer."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        return await raw.reader.readuntil(b"\r\n\r\n")


async def is_dropped(raw: RawSocket) -> bool:
    """Whether the server ends the connection."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        try:
            while await raw.reader.read(65_536):
                pass
        except ConnectionError:
            pass
    return True


# Handshakes.


@pytest.mark.parametrize(("header", "status"), [(LIMBO[0], b"400"), (LIMBO[1], b"400"), (LIMBO[2], b"431")])
async def test_a_handshake_that_cannot_be_parsed_is_answered_and_counted(
    node: NodeProcess, header: str, status: bytes
) -> None:
    before = node.metric("anynode_handshakes_refused_total")
    async with connected(node.port) as raw:
        await raw.send(handshake("/ws", header) + b"xx")
        assert (await head_of(raw)).split()[1] == status
        assert await is_dropped(raw)
    assert node.metric("anynode_handshakes_refused_total") == before + 1


async def test_a_handshake_that_cannot_be_parsed_does_not_disturb_the_drain(
    module_database_url: str, tmp_path: Path
) -> None:
    with running_node(module_database_url, tmp_path) as node:
        async with connected(node.port) as raw, raw_socket(node.port) as other:
            await raw.send(handshake("/ws", LIMBO[0]))
            await head_of(raw)
            node.process.send_signal(signal.SIGTERM)
            assert (await other.closed())[0] == 1012
        assert await asyncio.to_thread(node.stop) == 0
        assert "Traceback" not in node.log.read_text()


@pytest.mark.parametrize("how", ["header", "subprotocol", "frame", "request"])
async def test_a_token_may_be_as_long_as_a_token_may_be(node: NodeProcess, user: str, how: str) -> None:
    token = long_token(user)
    assert TOKEN_CHARACTERS_MAX - 2 <= len(token) <= TOKEN_CHARACTERS_MAX
    bearer = f"Authorization: Bearer {token}"
    if how == "request":
        async with connected(node.port) as raw:
            await raw.send(f"GET /conversations HTTP/1.1\r\nHost: a\r\n{bearer}\r\n\r\n".encode())
            assert (await head_of(raw)).split()[1] == b"200"
        return
    offered = f"Sec-WebSocket-Protocol: anynode.v1, bearer.{token}"
    headers = {"header": [bearer], "subprotocol": [offered], "frame": []}[how]
    async with raw_socket(node.port, "/ws", *headers) as raw:
        if how == "frame":
            await raw.send(frame(1, f'{{"type":"auth","token":"{token}"}}'.encode()))
        received = await raw.receive()
        assert received is not None
        assert b'"type":"ready"' in received[1]


async def test_cookies_that_are_long_get_through(node: NodeProcess, user: str) -> None:
    cookie = "Cookie: a=" + "x" * 40_000
    async with raw_socket(node.port, "/ws", cookie, f"Authorization: Bearer {token_for(user)}") as raw:
        assert await raw.receive() is not None


# Frames.


@pytest.mark.parametrize("sent", [frame(9), frame(10, b"x"), frame(1), frame(1, b"{}"), frame(1, b"", fin=False)])
@pytest.mark.parametrize("path", ["/ws", "/api/chat"])
async def test_a_flood_of_frames_without_a_token_is_cut_off(node: NodeProcess, path: str, sent: bytes) -> None:
    async with raw_socket(node.port, path) as raw, asyncio.TaskGroup() as group:
        closing = group.create_task(raw.closed())
        for _ in range(10):
            await raw.send(sent * 10_000)
        assert (await closing)[0] in (1008, 1002)  # 1002: a first fragment behind another


async def test_a_flood_of_pings_with_a_token_is_cut_off_and_a_burst_is_not(node: NodeProcess, user: str) -> None:
    async with raw_socket(node.port, "/ws", f"Authorization: Bearer {token_for(user)}") as raw:
        await raw.send(frame(9, b"p") * (FRAMES_BURST // 2))
        answers = [await raw.receive() for _ in range(FRAMES_BURST // 2 + 1)]
        assert answers.count((10, b"p")) == FRAMES_BURST // 2
        await raw.send(frame(9, b"p") * 20_000)
        assert (await raw.closed()) == (1008, "too much was sent at once")


@pytest.mark.parametrize("path", ["/ws", "/api/chat"])
@pytest.mark.parametrize("is_whole", [True, False])
async def test_a_long_first_message_without_a_token_is_refused(node: NodeProcess, path: str, is_whole: bool) -> None:
    message = frame(1, b"x" * 70_000)
    async with raw_socket(node.port, path) as raw:
        await raw.send(message if is_whole else message[:-1])
        assert (await raw.closed())[0] == 1009


# Requests.


@pytest.mark.parametrize("is_authenticated", [True, False])
async def test_trailers_are_cut_off(node: NodeProcess, user: str, is_authenticated: bool) -> None:
    bearer = f"Authorization: Bearer {token_for(user)}\r\n" if is_authenticated else ""
    async with connected(node.port) as raw:
        head = f"GET /conversations HTTP/1.1\r\nHost: a\r\n{bearer}Transfer-Encoding: chunked\r\n\r\n0\r\n"
        await raw.send(head.encode())
        sent = 0
        while sent < 16_000_000 and not raw.writer.transport.is_closing():
            await raw.send(b"a: b\r\n" * 10_000)
            sent += 60_000
        assert sent < 16_000_000
        assert await is_dropped(raw)


async def test_idle_connections_make_room_for_new_ones() -> None:
    peers = Peers(5)
    async with listening(echo, peers) as (_, port):
        idle = [RawSocket(*await asyncio.open_connection("127.0.0.1", port)) for _ in range(30)]
        assert all([await is_dropped(raw) for raw in idle[:25]])
        for raw in idle[25:]:
            await raw.send(GET + b"\r\n")
            assert (await head_of(raw)).startswith(b"HTTP/1.1 200")
        assert peers.connections == 5
        for raw in idle:
            raw.writer.transport.abort()


async def test_a_websocket_does_not_make_room() -> None:
    peers = Peers(2)
    async with (
        listening(echo, peers) as (_, port),
        raw_socket(port) as one,
        raw_socket(port) as two,
        connected(port) as third,
    ):
        assert await is_dropped(third)
        for raw in (one, two):
            await raw.send(frame(1, b"x"))
            assert await raw.receive() == (1, b"x")


# The log.


async def test_nothing_that_a_peer_sends_makes_a_traceback_or_is_in_the_log(node: NodeProcess, user: str) -> None:
    wrong = frame(1, f'{{"type":"{CANARY}","token":"{CANARY}"}}'.encode())
    many = [frame(1, b"", fin=False), *[frame(0, b"", fin=False)] * 1100]
    for path in ("/ws", "/api/chat"):
        for headers in ([], [f"Authorization: Bearer {token_for(user)}"]):
            for end in (frame(1, b"\xff"), b"".join(many), frame(1, b"x", rsv=3), frame(8, b"\x03")):
                async with raw_socket(node.port, path, *headers) as raw:
                    await raw.send(wrong * 3 + end)
                    assert (await raw.closed())[0] in (1002, 1006, 1007, 1008)
    for _ in range(3 * LINES_MAX):
        async with connected(node.port) as raw:
            await raw.send(f"{CANARY} nonsense\r\n\r\n".encode())
            assert await is_dropped(raw)
    assert node.get(f"/assets/{CANARY}" + "x" * 300)[0] == 404
    assert node.get(f"/assets/..%2F{CANARY}")[0] == 404
    log = node.log.read_text()
    assert "Traceback" not in log
    assert CANARY not in log
    assert log.count("Invalid HTTP request received") <= LINES_MAX
