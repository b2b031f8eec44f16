"""The nodes of `anynode dev`, as processes: started, supervised, restarted where their end was ordered, and stopped.

No node is left behind: one that is not stopped here ends by itself when this process dies.
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

from anynode.server.dev.load_balancer import LoadBalancer
from anynode.server.dev.orders import Action, read_order
from anynode.server.errors import ConfigurationError

READY_SECONDS: Final = 30.0
READY_POLL_SECONDS: Final = 0.05
READY_ANSWER_SECONDS: Final = 2.0
AGAIN_SECONDS: Final = 3  # from the end of a node that was ordered to its next start: long enough to look at
STOPPING_SECONDS: Final = 10.0  # how long a node may take to end, besides its drain


class DevNode:
    """A node on its port, under its name, through all of its processes."""

    def __init__(self, name: str, host: str, port: int) -> None:
        self.name = name
        self.port = port
        self.process: asyncio.subprocess.Process | None = None
        self.is_ordered_to_end = False
        self.host = reachable(host)

    @property
    def pid(self) -> int | None:
        """The id of the process that runs now, or None."""
        return None if self.process is None or self.process.returncode is not None else self.process.pid

    def signal(self, number: signal.Signals) -> None:
        """Send the process a signal, if it runs."""
        if (pid := self.pid) is not None:
            try:
                os.kill(pid, number)  # `Process.send_signal` may take the exit status away from `wait`
            except ProcessLookupError:
                pass

    async def wait_ended(self) -> int | None:
        """Wait for the end of the process, and return its exit status."""
        return None if self.process is None else await self.process.wait()

    async def is_ready(self) -> bool:
        """Ask the node whether it is ready."""
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
    """All nodes of `anynode dev`; the load balancer is told which of them to choose."""

    def __init__(
        self,
        environment: Mapping[str, str],
        host: str,
        ports: Sequence[int],
        load_balancer: LoadBalancer,
        *,
        drain_seconds: float,
    ) -> None:
        self.nodes = [DevNode(name, host, port) for name, port in zip(ascii_uppercase, ports, strict=False)]
        self._environment = environment
        self._load_balancer = load_balancer
        self._drain_seconds = drain_seconds

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Start all nodes. At the end of the context they are stopped; those that do not stop in time are killed."""
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
                        await node.wait_ended()

    async def wait_ready(self) -> None:
        """Wait until all nodes are ready, and have them chosen. Raises ConfigurationError."""
        deadline = asyncio.get_running_loop().time() + READY_SECONDS
        for node in self.nodes:
            while not await node.is_ready():
                if node.pid is None:
                    raise ConfigurationError("a node could not start; what is wrong is said above")
                if asyncio.get_running_loop().time() > deadline:
                    late = f"is not ready after {READY_SECONDS:g} seconds"
                    raise ConfigurationError(f"the node on port {node.port} {late}")
                await asyncio.sleep(READY_POLL_SECONDS)
            self._load_balancer.choose(node.name, node.host, node.port)

    async def supervise(self) -> None:
        """Obey orders and restart the nodes that they have ended, until no node is left or will be restarted."""
        async with asyncio.TaskGroup() as group:
            obeying = group.create_task(self._obey())
            await asyncio.gather(*(self._keep(node) for node in self.nodes))
            obeying.cancel()

    async def _start(self, node: DevNode) -> None:
        """Start the node's process, in a session of its own: Ctrl-C then reaches only this process, and the node can
        drain. The node stops by itself when this process dies, as its standard input then ends."""
        names, orders = ",".join(each.name for each in self.nodes), self._orders_in.fileno()
        node.is_ordered_to_end = False
        node.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "anynode.server.dev.node"),
            *("--orders", str(orders), "--neighbours", names),
            env={**self._environment, "PORT": str(node.port), "NODE_NAME": node.name},
            stdin=self._lifeline,
            pass_fds=[orders],
            start_new_session=True,
        )

    async def _keep(self, node: DevNode) -> None:
        """Restart a node as often as its end was ordered, until it ends without an order."""
        while True:
            status = await node.wait_ended()
            self._load_balancer.cut(node.name)
            if not node.is_ordered_to_end:
                click.secho(f"  the node on port {node.port} ended (status {status})", fg="yellow", err=True)
                return
            await asyncio.sleep(AGAIN_SECONDS)
            await self._start(node)
            while node.pid is not None and not node.is_ordered_to_end:
                if await node.is_ready() and not node.is_ordered_to_end:
                    self._load_balancer.choose(node.name, node.host, node.port)
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
        self._load_balancer.avoid(node.name)
        match action:
            case "kill":
                node.signal(signal.SIGKILL)
                notice = f"was killed from the page; it starts again in {AGAIN_SECONDS} seconds"
            case "drain":
                node.signal(signal.SIGTERM)
                notice = f"drains, as the page has asked; it starts again {AGAIN_SECONDS} seconds after its end"
        click.secho(f"  node {node.name} {notice}", fg="yellow")

    async def _stop(self) -> None:
        for node in self.nodes:
            node.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(self._drain_seconds + STOPPING_SECONDS):
                for node in self.nodes:
                    await node.wait_ended()
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
    """Return an address at which a server can be reached that listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
