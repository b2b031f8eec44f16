"""The nodes of `anynode dev`, as processes: started, watched, started again where their end was ordered, and stopped.

None is left behind: what we do not stop ends by itself when we die.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from string import ascii_uppercase
from typing import BinaryIO, Final

import click

from anynode.server.dev.load_balancer import Front
from anynode.server.dev.orders import Action, read_order
from anynode.server.errors import ConfigurationError

READY_SECONDS: Final = 30.0
READY_POLL_SECONDS: Final = 0.05
READY_ANSWER_SECONDS: Final = 2.0
AGAIN_SECONDS: Final = 3  # from the end of a node that was ordered to its next start: long enough to look at
STOPPING_SECONDS: Final = 10.0  # how long a node may take to end, besides its drain


class DevNode:
    """A node on its port, under its name, through all of its lives."""

    def __init__(self, name: str, host: str, port: int) -> None:
        self.name = name
        self.port = port
        self.process: asyncio.subprocess.Process | None = None
        self.is_ordered_to_end = False
        self.host = reachable(host)

    @property
    def pid(self) -> int | None:
        """Of its process, while that runs."""
        return None if self.process is None or self.process.returncode is not None else self.process.pid

    def signal(self, number: signal.Signals) -> None:
        """Send its process a signal, if it runs."""
        if (pid := self.pid) is not None:
            try:
                os.kill(pid, number)  # `Process.send_signal` may take the exit status away from `wait`
            except ProcessLookupError:
                pass

    async def ended(self) -> int | None:
        """Wait for the end of its process; returns the exit status."""
        return None if self.process is None else await self.process.wait()

    async def is_ready(self) -> bool:
        """Whether it says so."""
        try:
            async with asyncio.timeout(READY_ANSWER_SECONDS):
                reader, writer = await asyncio.open_connection(self.host, self.port)
                try:
                    writer.write(b"GET /readyz HTTP/1.0\r\n\r\n")
                    return (await reader.readline()).split()[1:2] == [b"200"]
                finally:
                    writer.transport.abort()
        except (OSError, ValueError):  # TimeoutError is an OSError
            return False


class DevNodes:
    """All nodes of `anynode dev`, and the front that is told which of them to choose."""

    def __init__(
        self, environment: Mapping[str, str], host: str, ports: Sequence[int], front: Front, *, drain_seconds: float
    ) -> None:
        self.nodes = [DevNode(name, host, port) for name, port in zip(ascii_uppercase, ports, strict=False)]
        self._environment = environment
        self._front = front
        self._drain_seconds = drain_seconds

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Start them all; at the end they are stopped, or killed where they do not stop or are not waited for."""
        with _pipe() as (self._orders, self._orders_in), _pipe() as (self._lifeline, _):
            os.set_blocking(self._orders_in.fileno(), False)
            try:
                for node in self.nodes:
                    await self._start(node)
                yield
            finally:
                try:
                    await self._stop()
                finally:  # also at an impatient second Ctrl-C
                    for node in self.nodes:
                        node.signal(signal.SIGKILL)
                    for node in self.nodes:
                        await node.ended()

    async def ready(self) -> None:
        """Wait until all of them are, and have them chosen. Raises ConfigurationError."""
        deadline = asyncio.get_running_loop().time() + READY_SECONDS
        for node in self.nodes:
            while not await node.is_ready():
                if node.pid is None:
                    raise ConfigurationError("a node could not start; what is wrong is said above")
                if asyncio.get_running_loop().time() > deadline:
                    late = f"is not ready after {READY_SECONDS:g} seconds"
                    raise ConfigurationError(f"the node on port {node.port} {late}")
                await asyncio.sleep(READY_POLL_SECONDS)
            self._front.choose(node.name, node.host, node.port)

    async def watch(self) -> None:
        """Obey orders and start again whom they have ended, until none is left and none is to start again."""
        async with asyncio.TaskGroup() as group:
            obeying = group.create_task(self._obey())
            await asyncio.gather(*(self._keep(node) for node in self.nodes))
            obeying.cancel()

    async def _start(self, node: DevNode) -> None:
        """In a session of its own, so that Ctrl-C reaches only us and it can drain; it stops by itself when we die, as
        its input then ends."""
        names, orders = ",".join(each.name for each in self.nodes), self._orders_in.fileno()
        node.is_ordered_to_end = False
        node.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "anynode.server.cli", "serve", "--stop-with-input", "--quiet"),
            *("--orders", str(orders), "--neighbours", names),
            env={**self._environment, "PORT": str(node.port), "NODE_NAME": node.name},
            stdin=self._lifeline,
            pass_fds=[orders],
            start_new_session=True,
        )

    async def _keep(self, node: DevNode) -> None:
        """See a node through its lives, up to an end that nobody has ordered."""
        while True:
            status = await node.ended()
            self._front.cut(node.name)
            if not node.is_ordered_to_end:
                click.secho(f"  the node on port {node.port} ended (status {status})", fg="yellow", err=True)
                return
            await asyncio.sleep(AGAIN_SECONDS)
            await self._start(node)
            while node.pid is not None and not node.is_ordered_to_end:
                if await node.is_ready() and not node.is_ordered_to_end:
                    self._front.choose(node.name, node.host, node.port)
                    break
                await asyncio.sleep(READY_POLL_SECONDS)

    async def _obey(self) -> None:
        """Read the orders that nodes pass on."""
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, self._orders)
        try:
            while line := await reader.readline():
                order = read_order(line)
                for node in self.nodes:
                    if order is not None and node.name == order.name and node.pid is not None:
                        self._end(node, order.action)
        finally:
            transport.close()

    def _end(self, node: DevNode, action: Action) -> None:
        """End a node as was ordered. Its connections are cut when it has ended, not now: the answer to the order may
        be on its way over one of them."""
        node.is_ordered_to_end = True
        self._front.avoid(node.name)
        match action:
            case "kill":
                node.signal(signal.SIGKILL)
                said = f"was killed from the page; it starts again in {AGAIN_SECONDS} seconds"
            case "drain":
                node.signal(signal.SIGTERM)
                said = f"drains, as the page has asked; it starts again {AGAIN_SECONDS} seconds after its end"
        click.secho(f"  node {node.name} {said}", fg="yellow")

    async def _stop(self) -> None:
        for node in self.nodes:
            node.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(self._drain_seconds + STOPPING_SECONDS):
                for node in self.nodes:
                    await node.ended()
        except TimeoutError:
            for node in self.nodes:
                if node.pid is not None:
                    click.secho("  a node does not stop and is killed", fg="yellow", err=True)


@contextmanager
def _pipe() -> Iterator[tuple[BinaryIO, BinaryIO]]:
    read, write = os.pipe()
    with open(read, "rb", 0) as reader, open(write, "wb", 0) as writer:
        yield reader, writer


def reachable(host: str) -> str:
    """Where that can be reached which listens on an address."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
