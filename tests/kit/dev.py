"""`anynode dev` as people run it, and what it leaves behind."""

from __future__ import annotations

import json
import random
import re
import signal
import socket
import subprocess
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import psutil  # type: ignore[import-untyped, unused-ignore]

from tests.kit.command_line import COMMAND, environment, wait_until

OWN_PORTS: Final = (11_000, 32_000)


class Dev:
    """`anynode dev` in a process of its own, once it has said where to go."""

    def __init__(self, process: subprocess.Popen[str], output: Path, ports: list[int], front_port: int | None) -> None:
        self.process = process
        self.output = output
        self.ports = ports
        self.front_port = front_port
        found = re.search(r"Token \(7 days\) +(\S+)", output.read_text())
        assert found is not None
        self.token = found[1]

    @property
    def urls(self) -> list[str]:
        """The URL of each node."""
        return [f"http://127.0.0.1:{port}" for port in self.ports]

    @property
    def entry(self) -> str:
        """The one URL that the page is opened at."""
        return f"http://127.0.0.1:{self.front_port or self.ports[0]}"

    def family(self) -> list[psutil.Process]:
        """The process and all that it has started."""
        process = psutil.Process(self.process.pid)
        return [process, *process.children(recursive=True)]

    def node(self, port: int) -> psutil.Process:
        """The node that listens on a port."""
        return next(
            p
            for p in self.family()
            if "anynode.server.dev.node" in p.cmdline() and p.environ().get("PORT") == str(port)
        )


@contextmanager
def running_dev(data_directory: Path, nodes: int = 1, **settings: str) -> Iterator[Dev]:
    """Run `anynode dev` on free ports until it has said where to go; interrupt it at the end."""
    ports = successive_free_ports(nodes + 1 if nodes > 1 else 1)
    output = data_directory.parent / f"dev-{uuid.uuid4().hex}.log"
    with output.open("w") as stdout:
        process = subprocess.Popen(
            [*COMMAND, "dev", "--data-dir", str(data_directory), "--nodes", str(nodes)],
            env=environment(PORT=str(ports[0]), **settings),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    try:
        wait_until(lambda: "Ctrl-C" in output.read_text() or process.poll() is not None, 60)
        assert process.poll() is None, output.read_text()
        yield Dev(process, output, ports[:nodes], ports[nodes] if nodes > 1 else None)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        # The fixture `data_directory` kills what else still mentions the directory.


def processes_that_mention(directory: Path) -> list[psutil.Process]:
    """What still runs of a data directory: the postmaster has it in its arguments, nodes in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), process.environ().get("DATABASE_URL", ""), process.cwd()]
        except psutil.Error:
            continue
        if any(str(directory) in word or str(directory).replace("/", "%2F") in word for word in words):
            found.append(process)
    return found


def successive_free_ports(count: int) -> list[int]:
    """Find `count` ports in a row on which nothing listens.

    They are below the ports that systems give to connections and to port 0: other tests take those at any moment.
    """
    while True:
        first = random.randrange(*OWN_PORTS)
        ports = list(range(first, first + count))
        try:
            for port in ports:
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return ports


def conversations(url: str, token: str) -> list[dict[str, Any]]:
    """List the conversations of the token's user at a node."""
    request = urllib.request.Request(f"{url}/conversations", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=10) as response:
        listed: list[dict[str, Any]] = json.load(response)["conversations"]
        return listed
