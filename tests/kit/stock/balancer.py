"""A load balancer of one address: each connection goes to the next living node, and connections break when told to."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Literal, TypeAlias

Break: TypeAlias = Literal["fin", "rst"]
RESET = struct.pack("ii", 1, 0)  # SO_LINGER with no time: close() sends RST


class Balancer:
    """What is forwarded where. `ports` may change; a port that refuses is passed over."""

    def __init__(self, ports: Sequence[int]) -> None:
        self.ports = list(ports)
        self.connections = 0
        self.bytes_sent = 0  # to clients, of all connections
        self.port = 0
        self._turn = 0
        self._cuts: list[tuple[int | bytes, Break]] = []
        self._cut_from = 0
        self._open: dict[asyncio.StreamWriter, asyncio.StreamWriter] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def http(self) -> str:
        """The balancer's base URL."""
        return f"http://127.0.0.1:{self.port}"

    def cut(self, at: int | bytes, how: Break = "rst") -> None:
        """Break a connection before its client gets a certain byte. `at` is a number of bytes to clients, counted from
        the last cut or else from now, or the bytes at which to break. Several cuts take effect one after the other."""
        self._cuts.append((at, how))
        if len(self._cuts) == 1:
            self._cut_from = self.bytes_sent

    @property
    def has_cut(self) -> bool:
        """Whether no cut is still to come."""
        return not self._cuts

    def drop(self, how: Break = "rst") -> None:
        """Break all connections."""
        for client, node in list(self._open.items()):
            self._break(client, node, how)

    def _break(self, client: asyncio.StreamWriter, node: asyncio.StreamWriter, how: Break) -> None:
        self._open.pop(client, None)
        if how == "rst" and not client.is_closing():
            client.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            client.transport.abort()
        client.close()
        node.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            node_reader, node = await self._connect()
        except OSError:
            client.transport.abort()
            self._tasks.discard(task)
            return
        self._open[client] = node
        try:
            up = asyncio.create_task(_forward(reader, node))
            await self._forward_down(node_reader, client, node)
            up.cancel()
            await asyncio.wait((up,))
        finally:
            self._open.pop(client, None)
            client.close()
            node.close()
            self._tasks.discard(task)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        for _ in self.ports:
            port = self.ports[self._turn % len(self.ports)]
            self._turn += 1
            try:
                return await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                pass
        raise ConnectionRefusedError

    async def _forward_down(
        self, reader: asyncio.StreamReader, client: asyncio.StreamWriter, node: asyncio.StreamWriter
    ) -> None:
        try:
            while data := await reader.read(65_536):
                kept = self._kept(data)
                if kept is not None:
                    _, how = self._cuts.pop(0)
                    client.write(kept)
                    self.bytes_sent += len(kept)
                    self._cut_from = self.bytes_sent
                    await client.drain()
                    if kept and how == "rst":
                        # A reset overtakes what lies unread at the client; what came before it is to be seen.
                        await asyncio.sleep(0.01)
                    self._break(client, node, how)
                    return
                client.write(data)
                self.bytes_sent += len(data)
                await client.drain()
        except OSError:
            # The node has broken off, so the client sees a broken connection too.
            self._break(client, node, "rst")

    def _kept(self, data: bytes) -> bytes | None:
        """What of the data comes before the next cut; None: that is not in it."""
        if not self._cuts:
            return None
        at, _ = self._cuts[0]
        place = data.find(at) if isinstance(at, bytes) else at - (self.bytes_sent - self._cut_from)
        return data[: max(0, place)] if place < len(data) and (place >= 0 or isinstance(at, int)) else None


async def _forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    except OSError:
        pass
    finally:
        if reader.at_eof() or reader.exception() is not None:
            writer.close()  # the client has gone


@asynccontextmanager
async def running_balancer(*ports: int) -> AsyncIterator[Balancer]:
    """A balancer in front of nodes; all of its connections are broken at the end."""
    balancer = Balancer(ports)
    server = await asyncio.start_server(balancer._accept, "127.0.0.1", 0)
    balancer.port = server.sockets[0].getsockname()[1]
    try:
        yield balancer
    finally:
        server.close()
        while balancer._tasks:
            balancer.drop()
            await asyncio.wait(balancer._tasks, timeout=0.1)
