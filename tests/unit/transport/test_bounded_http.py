"""An HTTP connection whose peer sends what it likes, over no network: what is counted, and when it is dropped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from uvicorn.server import ServerState

from anynode.server.transport.bounded_http import (
    HEAD_BYTES_MAX,
    PIPELINED_MAX,
    SLICE_BYTES,
    TRAILER_BYTES_MAX,
    BoundedHttp,
)
from anynode.server.transport.peers import Peers
from tests.kit.listening import configuration, handshake

GET = b"GET /livez HTTP/1.1\r\nHost: a\r\n"
TASKS: set[asyncio.Task[None]] = set()  # of the applications of a test
CHUNKED = GET + b"Transfer-Encoding: chunked\r\n\r\n"


class Wire(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.is_ended = self.is_aborted = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Keep it."""
        self.written += data

    def is_closing(self) -> bool:
        """Return whether it was closed."""
        return self.is_ended

    def close(self) -> None:
        """Note it."""
        self.is_ended = True

    def abort(self) -> None:
        """Note it."""
        self.is_ended = self.is_aborted = True

    def pause_reading(self) -> None:
        """Do nothing."""

    def resume_reading(self) -> None:
        """Do nothing."""

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Do nothing."""


class Client:
    """The peer of an HTTP connection whose application never answers, or does it at once."""

    def __init__(self, peers: Peers, *, is_answered: bool = False) -> None:
        self.is_answered = is_answered
        self.scopes: list[Any] = []
        self.bodies = 0
        self.wire = Wire()
        self.protocol = BoundedHttp(configuration(self._app, peers), ServerState(), {}, peers=peers)
        self.protocol.connection_made(self.wire)

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        task = asyncio.current_task()
        assert task is not None
        TASKS.add(task)
        if not self.is_answered:
            while (message := await receive())["type"] == "http.request":
                self.bodies += len(message["body"])
        else:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})

    async def says(self, data: bytes) -> None:
        """Send something, and let the application have its turn."""
        self.protocol.data_received(data)
        await asyncio.sleep(0)
        await asyncio.sleep(0)


@pytest_asyncio.fixture
async def peers() -> AsyncIterator[Peers]:
    """What all connections of a test share."""
    yield Peers(100)
    for task in TASKS:
        task.cancel()
    TASKS.clear()


@pytest.fixture
def client(peers: Peers) -> Client:
    """A client whose requests are not answered."""
    return Client(peers)


async def test_a_head_may_be_as_long_as_it_may_be(client: Client) -> None:
    lines = b"".join(b"X-%d: %s\r\n" % (number, b"x" * 1000) for number in range(60))
    await client.says(GET + lines + b"\r\n")
    assert len(client.scopes) == 1
    assert not client.wire.is_ended


async def test_a_head_that_is_too_long_is_dropped_though_it_comes_in_one_piece(client: Client) -> None:
    await client.says(GET + b"X-Long: " + b"x" * (HEAD_BYTES_MAX + 3 * SLICE_BYTES) + b"\r\n\r\n")
    assert client.wire.is_aborted
    assert not client.scopes


async def test_trailers_are_dropped(client: Client) -> None:
    await client.says(CHUNKED + b"2\r\n{}\r\n0\r\nX-Trailer: x\r\n\r\n")
    (scope,) = client.scopes
    assert b"x-trailer" not in dict(scope["headers"])
    assert not client.wire.is_ended


@pytest.mark.parametrize("line", [b"a: b\r\n", b"", b"x" * 100])
async def test_too_many_trailers_or_one_that_does_not_end_are_dropped(client: Client, line: bytes) -> None:
    more = line * (2 * TRAILER_BYTES_MAX // len(line)) if line else b"x" * 2 * TRAILER_BYTES_MAX
    await client.says(CHUNKED + b"0\r\n")
    for at in range(0, len(more), 1000):
        if not client.wire.is_ended:
            await client.says(more[at : at + 1000])
    assert client.wire.is_ended


@pytest.mark.parametrize("size", [1, 10, 100, 4096, 100_000])
async def test_a_body_in_chunks_is_no_trailer(client: Client, size: int) -> None:
    count = 200_000 // size
    chunks = b"%x\r\n%s\r\n" % (size, b"x" * size) * count
    await client.says(CHUNKED)
    for at in range(0, len(chunks), 100_000):
        await client.says(chunks[at : at + 100_000])
    await client.says(b"0\r\n\r\n")
    assert not client.wire.is_ended
    assert client.bodies == size * count


async def test_what_a_chunk_says_beside_its_size_is_bounded(client: Client) -> None:
    await client.says(CHUNKED)
    for _ in range(100):
        if not client.wire.is_ended:
            await client.says(b"1;" + b"x" * 1000 + b"\r\nx\r\n")
    assert client.wire.is_ended


@pytest.mark.parametrize("length", [0, 10, 5000, 300_000])
async def test_requests_behind_each_other_are_counted_one_by_one(peers: Peers, length: int) -> None:
    client = Client(peers, is_answered=True)
    request = GET + b"X: " + b"x" * 30_000 + b"\r\nContent-Length: %d\r\n\r\n" % length + b"x" * length
    for _ in range(5):
        await client.says(request)
    await client.says(request + request)
    await client.says(request + GET)
    assert not client.wire.is_ended
    assert client.wire.written.count(b"HTTP/1.1 200") == 8


async def test_requests_that_wait_for_the_first_are_few(client: Client) -> None:
    await client.says((GET + b"\r\n") * PIPELINED_MAX)
    assert not client.wire.is_ended
    await client.says((GET + b"\r\n") * 10)
    assert client.wire.is_aborted


async def test_empty_lines_between_requests_do_not_keep_a_connection_open(peers: Peers) -> None:
    client = Client(peers, is_answered=True)
    await client.says(GET + b"\r\n")
    await client.says(b"\r\n")
    assert client.protocol.timeout_keep_alive_task is not None
    for _ in range(TRAILER_BYTES_MAX):
        if not client.wire.is_ended:
            await client.says(b"\r\n")
    assert client.wire.is_ended


async def test_a_connection_is_idle_until_a_head_is_whole_and_after_its_answer(peers: Peers) -> None:
    few = Peers(1)
    for is_answered, said, is_idle in [
        (False, b"", True),
        (False, GET, True),
        (False, GET + b"\r\n", False),
        (True, GET + b"\r\n", True),
        (True, GET + b"\r\n" + GET, True),
        (False, handshake(), False),
    ]:
        client = Client(few, is_answered=is_answered)
        if said:
            await client.says(said)
        other = Client(few)
        assert (client.wire.is_aborted, other.wire.is_aborted) == (is_idle, not is_idle), said
        for each in (client, other):
            few.remove(each.protocol)


async def test_a_handshake_behind_a_request_that_is_not_answered_is_dropped(client: Client) -> None:
    await client.says(GET + b"\r\n" + handshake())
    assert client.wire.is_aborted
