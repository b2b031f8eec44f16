"""A WebSocket whose peer sends what it likes, over no network: what is parsed when, and what the peer is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import pytest_asyncio
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.server import ServerState

from anynode.server.transport import bounded_websocket as module
from anynode.server.transport.bounded_websocket import BoundedWebSocket
from anynode.server.transport.connection import AUTHENTICATED
from anynode.server.transport.peers import Peers
from tests.kit.listening import LONGER_PATH, MESSAGE_BYTES, configuration, frame, handshake

TASKS: set[asyncio.Task[None]] = set()  # of the applications of a test
FAR = 1e9  # seconds; for timers that a test rings itself


class Wire(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.is_paused = self.is_ended = self.is_aborted = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Keep it."""
        self.written += data

    def can_write_eof(self) -> bool:
        """Return that one side may be closed."""
        return True

    def write_eof(self) -> None:
        """Do nothing."""

    def pause_reading(self) -> None:
        """Note it."""
        self.is_paused = True

    def resume_reading(self) -> None:
        """Note it."""
        self.is_paused = False

    def is_closing(self) -> bool:
        """Return whether it was closed."""
        return self.is_ended

    def close(self) -> None:
        """Note it."""
        self.is_ended = True

    def abort(self) -> None:
        """Note it."""
        self.is_ended = self.is_aborted = True

    def get_write_buffer_size(self) -> int:
        """Return that nothing waits."""
        return 0


class Client:
    """An application that a test plays, and the peer of its WebSocket."""

    def __init__(self, peers: Peers, path: str = "/ws") -> None:
        self.peers = peers
        self.scope: Any = None
        self.receive: Callable[[], Awaitable[Any]] = self._unset
        self.send: Callable[[Any], Awaitable[None]] = self._unset
        self.wire = Wire()
        self._is_called = asyncio.Event()
        self.protocol = BoundedWebSocket(
            configuration(self._app, peers),
            ServerState(),
            {},
            asyncio.get_running_loop(),
            peers=peers,
            longer_messages={LONGER_PATH: 4_194_304},
        )
        self.protocol.connection_made(self.wire)
        self.protocol.data_received(handshake(path))

    async def _unset(self, *_: object) -> Any:
        raise AssertionError

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        self.scope, self.receive, self.send = scope, receive, send
        task = asyncio.current_task()
        assert task is not None
        TASKS.add(task)
        self._is_called.set()
        await asyncio.Event().wait()

    async def accept(self, *, is_authenticated: bool = True) -> None:
        """Accept the connection."""
        await self._is_called.wait()
        await self.receive()
        await self.send({"type": "websocket.accept"})
        if is_authenticated:
            self.scope.pop(AUTHENTICATED)()
        self.wire.written = b""

    def says(self, *data: bytes) -> None:
        """Let the peer send something."""
        for piece in data:
            self.protocol.data_received(piece)

    async def take(self) -> Any:
        """What the application receives next."""
        async with asyncio.timeout(5):
            return await self.receive()

    @property
    def code(self) -> int | None:
        """The code with which the connection was closed."""
        at = self.wire.written.find(b"\x88")
        return None if at < 0 else int.from_bytes(self.wire.written[at + 2 : at + 4], "big")


@pytest_asyncio.fixture
async def peers() -> AsyncIterator[Peers]:
    """What all connections of a test share."""
    yield Peers(100, unfinished_bytes_max=1_000_000)
    for task in TASKS:
        task.cancel()
    TASKS.clear()


async def test_no_message_is_parsed_before_the_application_waits_for_it(peers: Peers) -> None:
    client = Client(peers)
    await client.accept()
    client.says(frame(1, b"one") + frame(1, b"two") + frame(1, b"three"))
    assert client.protocol.queue.empty()
    assert client.wire.is_paused
    for text in ("one", "two", "three"):
        assert (await client.take())["text"] == text
        assert client.protocol.queue.empty()
    assert not client.wire.is_paused


async def test_pings_are_answered_while_the_application_is_busy(peers: Peers) -> None:
    client = Client(peers)
    await client.accept()
    client.says(frame(9, b"a") + frame(9, b"b") + frame(1, b"text") + frame(9, b"c"))
    assert client.wire.written == b"\x8a\x01a\x8a\x01b"
    assert (await client.take())["text"] == "text"
    assert client.wire.written == b"\x8a\x01a\x8a\x01b\x8a\x01c"


async def test_a_close_waits_for_the_answer_to_what_came_before(peers: Peers) -> None:
    client = Client(peers)
    await client.accept()
    client.says(frame(1, b"text") + frame(8, b"\x03\xe8"))
    assert (await client.take())["text"] == "text"
    await client.send({"type": "websocket.send", "text": "answer"})
    assert (await client.take())["type"] == "websocket.disconnect"
    assert client.wire.written == b"\x81\x06answer\x88\x02\x03\xe8"


async def test_nothing_is_parsed_while_a_client_is_being_authenticated(peers: Peers) -> None:
    client = Client(peers, LONGER_PATH)
    await client.accept(is_authenticated=False)
    client.says(frame(9) + frame(1, b"x" * 300_000))
    assert client.wire.written == b""
    client.scope.pop(AUTHENTICATED)()
    assert len((await client.take())["text"]) == 300_000


async def test_a_first_message_has_a_bound_of_its_own(peers: Peers) -> None:
    for length, code in ((module.FIRST_MESSAGE_BYTES_MAX, None), (module.FIRST_MESSAGE_BYTES_MAX + 1, 1009)):
        client = Client(peers, LONGER_PATH)
        await client.accept(is_authenticated=False)
        client.says(frame(1, b"x" * length))
        assert (await client.take())["type"] == ("websocket.disconnect" if code else "websocket.receive")
        assert client.code == code


@pytest.mark.parametrize("sent", [frame(9), frame(10), frame(1, b"x", fin=False)])
async def test_frames_before_authentication_are_few(peers: Peers, sent: bytes) -> None:
    client = Client(peers)
    await client.accept(is_authenticated=False)
    taking = asyncio.create_task(client.take())
    await asyncio.sleep(0)
    first = frame(1, b"x", fin=False) if sent[0] == 1 else b""
    more = frame(0, b"x", fin=False) if first else sent
    client.says(first + more * (module.FIRST_FRAMES_MAX - bool(first)))
    assert client.code is None
    client.says(more)
    assert (await taking)["type"] == "websocket.disconnect"
    assert client.code == 1008


async def test_a_flood_of_pings_is_cut_off_at_the_burst(peers: Peers) -> None:
    client = Client(peers)
    await client.accept()
    taking = asyncio.create_task(client.take())
    await asyncio.sleep(0)
    client.says(frame(9) * 20_000)
    answered = client.wire.written.count(b"\x8a\x00")
    assert answered == module.FRAMES_AT_ONCE  # and others have their turn
    assert (await taking)["type"] == "websocket.disconnect"
    assert client.code == 1008
    assert client.wire.written.count(b"\x8a\x00") <= module.FRAMES_BURST + 1


async def test_a_flood_behind_the_end_does_not_take_the_close_code_away(peers: Peers) -> None:
    client = Client(peers)
    await client.accept()
    await client.send({"type": "websocket.close", "code": 1008})
    client.says(frame(9) * 20_000)
    for _ in range(100):
        await asyncio.sleep(0)
    assert client.protocol.is_lingering
    assert client.code == 1008
    assert not client.wire.is_aborted


async def test_too_many_bytes_make_the_peer_wait(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(Peers(10))
    await client.accept()
    for _ in range(6):  # more than the burst of 1 MiB
        client.says(frame(1, b"x" * 200_000))
        assert (await client.take())["type"] == "websocket.receive"
    client.says(frame(1, b"later"))
    assert client.wire.is_paused
    assert client.protocol.queue.empty()
    assert client.code is None
    assert (await client.take())["text"] == "later"


async def test_what_has_come_in_part_is_counted_and_let_go(peers: Peers) -> None:
    client = Client(peers)
    await client.accept()
    taking = asyncio.create_task(client.take())
    await asyncio.sleep(0)
    message = frame(1, b"x" * MESSAGE_BYTES)
    client.says(message[:300_000])
    assert peers.unfinished_bytes == 300_000
    client.says(message[300_000:])
    assert len((await taking)["text"]) == MESSAGE_BYTES
    assert peers.unfinished_bytes == 0


async def test_one_too_many_of_unfinished_messages_is_refused(peers: Peers) -> None:
    clients = [Client(peers) for _ in range(4)]
    for client in clients:
        await client.accept()
        taking = asyncio.create_task(client.take())
        await asyncio.sleep(0)
        client.says(frame(1, b"x" * MESSAGE_BYTES)[:300_000])
    assert [client.code for client in clients] == [None, None, None, 1008]
    assert peers.unfinished_bytes == 900_000
    assert (await taking)["code"] == 1008
    for client in clients:
        client.protocol.connection_lost(None)
    assert peers.unfinished_bytes == 0


@pytest.mark.parametrize("pongs", [0, 100])
async def test_a_message_has_a_time_to_come_whole(peers: Peers, monkeypatch: pytest.MonkeyPatch, pongs: int) -> None:
    monkeypatch.setattr(module, "MESSAGE_SECONDS_MAX", 0.05)
    client = Client(peers)
    await client.accept()
    taking = asyncio.create_task(client.take())
    await asyncio.sleep(0)
    client.says(frame(1, b"x", fin=False), frame(10) * pongs)
    assert (await taking)["code"] == 1008
    assert b"did not come whole within 0.05 seconds" in client.wire.written


async def test_a_message_that_is_whole_has_no_time_any_more(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MESSAGE_SECONDS_MAX", FAR)
    client = Client(peers)
    await client.accept()
    taking = asyncio.create_task(client.take())
    await asyncio.sleep(0)
    client.says(frame(1, b"x", fin=False), frame(0, b"y"))
    assert (await taking)["text"] == "xy"
    client.protocol._check_message()
    assert client.code is None
    assert client.protocol._message_timer is None


async def test_what_is_sent_after_the_end_fails_as_if_the_peer_had_gone(peers: Peers) -> None:
    client = Client(peers)
    await client.accept()
    taking = asyncio.create_task(client.take())
    await asyncio.sleep(0)
    client.says(frame(1, b"\xff"))
    assert (await taking)["type"] == "websocket.disconnect"
    for message in ({"type": "websocket.send", "text": "x"}, {"type": "websocket.close", "code": 1000}):
        with pytest.raises(ClientDisconnected):
            await client.send(message)
    assert client.code == 1007


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Content-Length: 2", b"400"),
        ("Transfer-Encoding: chunked", b"400"),
        ("\r\n".join(f"X-{number}: x" for number in range(150)), b"431"),
    ],
)
async def test_a_handshake_that_cannot_be_parsed_is_answered(peers: Peers, header: str, status: bytes) -> None:
    client = Client(peers)
    refused = BoundedWebSocket(client.protocol.config, ServerState(), {}, peers=peers, longer_messages={})
    wire = Wire()
    refused.connection_made(wire)
    refused.data_received(handshake("/ws", header))
    assert wire.written.split()[1] == status
    refused.data_received(b"xx")
    refused.shutdown()
    assert wire.is_ended


async def test_a_connection_that_the_peer_closes_does_not_disturb_the_shutdown(peers: Peers) -> None:
    client = Client(peers)
    await client.accept()
    taking = asyncio.create_task(client.take())
    await asyncio.sleep(0)
    client.says(frame(8, b"\x03\xe8"))
    await taking
    client.protocol.shutdown()
    assert client.wire.is_ended
