"""A plain load balancer for the nodes of one machine: each connection goes to the next node."""

from __future__ import annotations

import asyncio
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final

CONNECT_SECONDS: Final = 1.0  # for a node to take a connection, before the next one is tried
PIECE_BYTES_MAX: Final = 65_536  # of what is on its way in one direction, besides what the sockets hold


class LoadBalancer:
    """Forwards connections to the nodes that may be chosen, which take turns. A connection stays with its node."""

    def __init__(self) -> None:
        self._chosen: dict[str, tuple[str, int]] = {}  # where they listen; whose turn is next comes first
        self._open: dict[str, set[StreamWriter]] = {}  # both ends of the connections that a node has
        self._tasks: set[asyncio.Task[None]] = set()

    def choose(self, name: str, host: str, port: int) -> None:
        """Give the node connections from now on."""
        self._chosen[name] = (host, port)

    def avoid(self, name: str) -> None:
        """Give the node no more connections; those that it has live on."""
        self._chosen.pop(name, None)

    def cut(self, name: str) -> None:
        """Abort the connections of a node that has ended, whatever is still to be sent over them."""
        self.avoid(name)
        for writer in self._open.get(name, ()):
            writer.transport.abort()

    @asynccontextmanager
    async def listening(self, host: str, port: int) -> AsyncIterator[asyncio.Server]:
        """Take connections while the context lasts; all of them are cut at its end. Raises OSError."""
        server = await asyncio.start_server(self._accept, host, port)
        try:
            yield server
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks)

    def _accept(self, reader: StreamReader, client: StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, client))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: StreamReader, client: StreamWriter) -> None:
        try:
            if (found := await self._connect()) is not None:
                name, node_reader, node = found
                with self._kept(name, client, node):
                    async with asyncio.TaskGroup() as group:
                        group.create_task(_forward(reader, node))
                        group.create_task(_forward(node_reader, client))
                    for writer in (client, node):
                        writer.close()
                        await writer.wait_closed()  # what it has not read yet is still on its way
        except* OSError:
            pass  # one of the two has broken off, so the other sees a broken connection too
        finally:
            client.transport.abort()

    async def _connect(self) -> tuple[str, StreamReader, StreamWriter] | None:
        """Connect to the next node that takes the connection, and return its name with the connection."""
        for name, (host, port) in list(self._chosen.items()):
            if name not in self._chosen:
                continue
            self._chosen[name] = self._chosen.pop(name)  # to the end
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    reader, writer = await asyncio.open_connection(host, port)
            except OSError:  # TimeoutError is one
                continue
            if name in self._chosen:
                return name, reader, writer
            writer.transport.abort()  # it was killed in the meantime
        return None

    @contextmanager
    def _kept(self, name: str, *writers: StreamWriter) -> Iterator[None]:
        """Let `cut` abort both ends of a connection while it is forwarded; abort them at the end of the context."""
        kept = self._open.setdefault(name, set())
        kept.update(writers)
        try:
            yield
        finally:
            kept.difference_update(writers)
            for writer in writers:
                writer.transport.abort()


async def _forward(reader: StreamReader, writer: StreamWriter) -> None:
    """Forward one direction up to its end, and pass that on; the other direction may go on."""
    while data := await reader.read(PIECE_BYTES_MAX):
        writer.write(data)
        await writer.drain()
    writer.write_eof()
