"""`anynode dev --nodes 3` and `anynode chat` with all three nodes: kill the one that answers, and read on."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Final

from tests.kit.command_line import COMMAND, anynode, environment, wait_until
from tests.kit.dev import Dev, running_dev

TOKENS: Final = 150
ANSWER: Final = "".join(f"w{number} " for number in range(TOKENS))


def start_chat(dev: Dev, data_directory: Path) -> subprocess.Popen[str]:
    """A chat that is given all nodes."""
    urls = [argument for url in dev.urls for argument in ("--url", url)]
    return subprocess.Popen(
        [*COMMAND, "chat", "--data-dir", str(data_directory), *urls],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )


def test_chat_hops_to_another_node_and_says_so(data_directory: Path) -> None:
    with running_dev(
        data_directory, nodes=3, ECHO_TOKENS=str(TOKENS), ECHO_TOKENS_PER_SECOND="50", LEASE_SECONDS="1"
    ) as dev:
        said = dev.output.read_text()
        assert all(f":{port}" in said for port in dev.ports)
        killable = dict(re.findall(r"kill -9 (\d+) +# (\S+)", said))
        assert sorted(killable.values()) == sorted(dev.urls)
        chat = start_chat(dev, data_directory)
        assert chat.stdin is not None
        assert chat.stdout is not None
        chat.stdin.write("hello\n")
        chat.stdin.flush()
        seen = chat.stdout.read(len("w0 w1 w2 "))
        dev.node(dev.ports[0]).kill()  # the first is asked first
        rest, status = chat.communicate(timeout=60)
        # The echo agent continues, so nothing is printed twice.
        assert seen + rest == ANSWER + "\n"
        assert chat.returncode == 0
        assert "the connection is lost" in status
        assert f"connected to {dev.urls[1].replace('http', 'ws')}" in status
        assert "continued on another node" in status
        assert dev.process.poll() is None
        wait_until(lambda: f"the node on port {dev.ports[0]} ended" in dev.output.read_text())
        assert anynode("chat", "--data-dir", str(data_directory), "--url", dev.urls[2], stdin="more\n").returncode == 0
