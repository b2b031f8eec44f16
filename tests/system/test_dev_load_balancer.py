"""The load balancer of `anynode dev`, in front of servers that are toys."""

from __future__ import annotations

import asyncio
import socket
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from typing import Final

import pytest

from anynode.server.dev.load_balancer import CONNECT_SECONDS, LoadBalancer
from tests.kit.harness import free_port

PATIENCE_SECONDS: Final = 5.0
PIECE: Final = b"x" * 65_536
PIECES_MAX: Final = 1000  # more than the kernel's buffers take
HOST: Final = "127.0.0.1"

Serve = Callable[[StreamReader, StreamWriter], Awaitable[None]]


class Toys:
    """A front, and what may be put behind it."""

    def __init__(self, stack: AsyncExitStack, port: int, front: LoadBalancer) -> None:
        self.front = front
        self.tasks: set[asyncio.Task[None]] = set()
        self._stack = stack
        self._port = port

    async def node(self, name: str, serve: Serve | None = None) -> None:
        """A server that says its name, or does something else, and is chosen."""

        async def say_name(reader: StreamReader, writer: StreamWriter) -> None:
            writer.write(name.encode())
            await reader.read()

        async def run(reader: StreamReader, writer: StreamWriter) -> None:
            try:
                await (serve or say_name)(reader, writer)
            except OSError:
                pass
            finally:
                writer.close()

        def accept(reader: StreamReader, writer: StreamWriter) -> None:
            self.tasks.add(asyncio.create_task(run(reader, writer)))

        server = await asyncio.start_server(accept, HOST, 0)
        self._stack.callback(server.close)
        self.front.choose(name, HOST, server.sockets[0].getsockname()[1])

    async def connect(self) -> tuple[StreamReader, StreamWriter]:
        """A client's connection to the front."""
        reader, writer = await asyncio.open_connection(HOST, self._port)
        self._stack.callback(writer.close)
        return reader, writer

    async def reached(self) -> str:
        """The name that a new connection is told; "" where it is closed at once."""
        reader, _ = await self.connect()
        async with asyncio.timeout(PATIENCE_SECONDS):
            return (await reader.read(1)).decode()


@pytest.fixture
async def toys() -> AsyncIterator[Toys]:
    async with opened_toys() as opened:
        yield opened


@asynccontextmanager
async def opened_toys() -> AsyncIterator[Toys]:
    front = LoadBalancer()
    async with AsyncExitStack() as stack:
        async with front.listening(HOST, 0) as server:
            toys = Toys(stack, server.sockets[0].getsockname()[1], front)
            yield toys
        if toys.tasks:  # their connections have ended with the front
            await asyncio.wait_for(asyncio.gather(*toys.tasks), PATIENCE_SECONDS)


async def end_of(reader: StreamReader) -> bytes:
    """What still comes, up to the end of the connection, however it ends."""
    data = bytearray()
    async with asyncio.timeout(PATIENCE_SECONDS):
        try:
            while piece := await reader.read(65_536):
                data += piece
        except ConnectionError:
            pass
    return bytes(data)


async def stream(reader: StreamReader, writer: StreamWriter) -> None:
    """Send for ever."""
    while True:
        writer.write(PIECE)
        await writer.drain()


async def test_connections_go_to_the_nodes_in_turn(toys: Toys) -> None:
    for name in "ABC":
        await toys.node(name)
    assert [await toys.reached() for _ in range(6)] == ["A", "B", "C", "A", "B", "C"]


async def test_a_node_that_refuses_is_passed_over(toys: Toys) -> None:
    toys.front.choose("A", HOST, free_port())
    await toys.node("B")
    assert [await toys.reached() for _ in range(3)] == ["B", "B", "B"]


async def test_a_node_that_does_not_take_a_connection_in_time_is_passed_over(toys: Toys) -> None:
    with ExitStack() as stack:
        full = stack.enter_context(socket.create_server((HOST, 0), backlog=0))
        for _ in range(8):  # more than it lets wait
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        toys.front.choose("A", *full.getsockname())
        await toys.node("B")
        assert CONNECT_SECONDS < PATIENCE_SECONDS
        assert await toys.reached() == "B"


async def test_a_node_that_is_avoided_gets_no_connection_and_keeps_those_that_it_has(toys: Toys) -> None:
    async def echo(reader: StreamReader, writer: StreamWriter) -> None:
        while data := await reader.read(100):
            writer.write(data)

    await toys.node("A", echo)
    reader, writer = await toys.connect()
    writer.write(b"1")
    assert await reader.readexactly(1) == b"1"
    await toys.node("B")
    toys.front.avoid("A")
    assert [await toys.reached() for _ in range(3)] == ["B", "B", "B"]
    writer.write(b"2")
    assert await reader.readexactly(1) == b"2"


async def test_where_no_node_is_left_a_connection_is_closed_at_once(toys: Toys) -> None:
    assert await toys.reached() == ""
    await toys.node("A")
    toys.front.avoid("A")
    assert await toys.reached() == ""


async def test_an_end_in_one_direction_leaves_the_other_one_open_and_no_byte_is_lost(toys: Toys) -> None:
    sent = bytes(range(256)) * 20_000

    async def tell_back(reader: StreamReader, writer: StreamWriter) -> None:
        data = await reader.read()  # up to the end of what the client sends
        writer.write(data)

    await toys.node("A", tell_back)
    reader, writer = await toys.connect()
    writer.write(sent)
    writer.write_eof()
    assert await end_of(reader) == sent


async def test_a_client_that_reads_nothing_stops_its_node_from_sending(toys: Toys) -> None:
    stopped: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def send_until_it_stops(reader: StreamReader, writer: StreamWriter) -> None:
        pieces = 0
        try:
            while pieces < PIECES_MAX:
                writer.write(PIECE)
                async with asyncio.timeout(0.3):
                    await writer.drain()
                pieces += 1
        except TimeoutError:
            pass
        stopped.set_result(pieces)

    await toys.node("A", send_until_it_stops)
    await toys.connect()
    assert await stopped < PIECES_MAX


async def test_the_connections_of_a_node_that_is_cut_end_at_once_and_others_live(toys: Toys) -> None:
    await toys.node("A", stream)
    doomed, _ = await toys.connect()
    await doomed.readexactly(len(PIECE))
    await toys.node("B")
    assert await toys.reached() == "x"
    living, _ = await toys.connect()
    assert await living.readexactly(1) == b"B"
    toys.front.cut("A")
    await end_of(doomed)
    assert not living.at_eof()
    assert [await toys.reached() for _ in range(2)] == ["B", "B"]


async def test_a_node_that_breaks_off_is_seen_to_break_off(toys: Toys) -> None:
    async def break_off(reader: StreamReader, writer: StreamWriter) -> None:
        writer.write(b"1")
        await reader.readexactly(1)  # what else has come is unread, so this is a reset
        writer.transport.abort()

    await toys.node("A", break_off)
    reader, writer = await toys.connect()
    assert await reader.readexactly(1) == b"1"
    writer.write(b"23")
    assert await end_of(reader) == b""


async def test_the_end_of_the_front_ends_all_connections() -> None:
    async with opened_toys() as toys:
        await toys.node("A", stream)
        reader, _ = await toys.connect()
        await reader.readexactly(len(PIECE))
        reading = asyncio.create_task(end_of(reader))
    await reading
