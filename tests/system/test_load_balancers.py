"""nginx and HAProxy with the configurations of docs/, changed in nothing but addresses, in front of real nodes."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import jwt
import psutil
import pytest
from websockets.exceptions import ConnectionClosed

from anynode.server.api.ai_sdk.wire import REQUEST_BYTES_MAX
from anynode.server.auth import TOKEN_CHARACTERS_MAX
from anynode.server.client.client import Client
from anynode.server.settings import Settings
from tests.agents.scripted import eventually
from tests.kit import programs
from tests.kit.harness import SECRET, Frame, NodeProcess, Socket, free_port, running_node, socket_to, text_of, token_for
from tests.kit.rest import rest_to

DOCS = Path(__file__).parents[2] / "docs"
PROGRAMS = {"nginx": "nginx.conf", "haproxy": "haproxy.cfg"}
SERVER_LINE = re.compile(r"^( +server .*?)10\.0\.0\.\d+:8000(.*\n)", re.MULTILINE)
TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")

TOKENS = 120
PACE = {"ECHO_TOKENS": str(TOKENS), "ECHO_TOKENS_PER_SECOND": "40", "DRAIN_SECONDS": "20"}
ANSWER = "".join(f"w{number} " for number in range(TOKENS))
RESTARTING = 1012
# HAProxy needs two failed checks, half a second and a tenth apart; the rest is for a busy machine.
NOTICED_SECONDS = 1.5


class Balancer(NodeProcess):
    """A balancer in front of nodes; one talks to it as to a node."""

    @property
    def logs(self) -> str:
        """All that it has logged."""
        return "".join(path.read_text() for path in self.log.parent.glob("*.log"))


class Nodes:
    """Three nodes on one database, each of which can be started again at its address."""

    def __init__(self, start: Callable[[int], NodeProcess]) -> None:
        self._start = start
        with ThreadPoolExecutor(3) as pool:
            self.running = list(pool.map(start, [free_port() for _ in range(3)]))

    @property
    def ports(self) -> list[int]:
        """Where they listen."""
        return [node.port for node in self.running]

    @property
    def ids(self) -> dict[str, NodeProcess]:
        """The running nodes, by the name that `ready` gives."""
        return {json.loads(node.get("/livez")[1])["node_id"]: node for node in self.running}

    def replace_the_ended(self) -> None:
        """Start another one in the place of each that has ended."""
        self.running = [node if node.process.poll() is None else self._start(node.port) for node in self.running]


@pytest.fixture(scope="module")
def nodes(module_database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Nodes for all tests here; those that a test ends are replaced for the next."""
    directory = tmp_path_factory.mktemp("nodes")
    with ExitStack() as stack:
        yield Nodes(lambda port: stack.enter_context(running_node(module_database_url, directory, PACE, port=port)))


@pytest.fixture(params=PROGRAMS)
def program(request: pytest.FixtureRequest) -> str:
    """The path of a balancer."""
    return programs.program(request.param, install=f"apt-get install {request.param}")


def command(program: str, directory: Path, port: int, node_ports: Sequence[int]) -> list[str]:
    """How to run it in the foreground, on a copy of the file in docs/ with the addresses of a test."""
    name = Path(program).name
    text = (DOCS / PROGRAMS[name]).read_text()
    lines = SERVER_LINE.findall(text)
    assert len(lines) >= len(node_ports)
    left = iter(node_ports)
    text = SERVER_LINE.sub(lambda line: f"{line[1]}127.0.0.1:{at}{line[2]}" if (at := next(left, None)) else "", text)
    file = directory / PROGRAMS[name]
    if name == "nginx":
        paths = "".join(f"{kind}_temp_path {directory}/{kind};\n" for kind in TEMPORARY)
        text = replaced(text, "listen 80;", f"listen 127.0.0.1:{port};")
        text = replaced(text, "/var/log/nginx/access.log", f"{directory}/access.log")
        file.write_text(replaced(text, "\nhttp {\n", f"\nhttp {{\n{paths}"))
        # As root, it would make its processes another user's, who may not write into a directory of tests.
        user = "user root;" if os.geteuid() == 0 else ""
        return [program, "-c", str(file), "-e", "stderr", "-g", f"daemon off; pid {directory}/pid; {user}"]
    text = replaced(text, "bind :80\n", f"bind 127.0.0.1:{port}\n")
    if os.geteuid() != 0:  # there is nobody else to become
        text = replaced(replaced(text, "    user haproxy\n", ""), "    group haproxy\n", "")
    file.write_text(text)
    return [program, "-db", "-f", str(file)]


def replaced(text: str, old: str, new: str) -> str:
    """Replace the one occurrence of a text."""
    assert text.count(old) == 1, old
    return text.replace(old, new)


@contextmanager
def running_balancer(program: str, directory: Path, node_ports: Sequence[int]) -> Iterator[Balancer]:
    """A balancer that listens; ended with all of its processes."""
    port = free_port()
    log = directory / "output.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command(program, directory, port, node_ports),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    balancer = Balancer(process, port, log)
    try:
        wait_until_listening(balancer)
        yield balancer
    finally:
        workers = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        try:
            balancer.stop(within_seconds=5)
        finally:
            for worker in psutil.wait_procs(workers, timeout=5)[1]:
                worker.kill()


def wait_until_listening(balancer: Balancer, within_seconds: float = 10.0) -> None:
    deadline = time.monotonic() + within_seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", balancer.port), timeout=1).close()
            return
        except OSError:
            if balancer.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the balancer does not listen: {balancer.logs[-2000:]}") from None
        time.sleep(0.02)


@pytest.fixture
def balancer(program: str, nodes: Nodes, tmp_path: Path) -> Iterator[Balancer]:
    """A balancer in front of the nodes."""
    nodes.replace_the_ended()
    with running_balancer(program, tmp_path, nodes.ports) as balancer:
        yield balancer


@asynccontextmanager
async def arrival(balancer: Balancer, user: str) -> AsyncIterator[tuple[Socket, str | int]]:
    """A new connection, and the node that it came to, or the code that it was closed with instead."""
    headers = {"Authorization": f"Bearer {token_for(user)}"}
    async with socket_to(balancer, ready=False, headers=headers) as opened:
        try:
            yield opened, (await opened.receive())["node_id"]
        except ConnectionClosed:
            yield opened, await opened.closed()


async def arrive(balancer: Balancer, user: str) -> str | int:
    """Where a new connection comes to."""
    async with arrival(balancer, user) as (_, reached):
        return reached


def test_the_configuration_is_accepted(program: str, tmp_path: Path) -> None:
    check = {"nginx": "-t", "haproxy": "-c"}[Path(program).name]
    done = subprocess.run(
        [*command(program, tmp_path, free_port(), [8001, 8002, 8003]), check], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "[WARNING]" not in done.stderr
    assert "[emerg]" not in done.stderr


@pytest.mark.parametrize("name", PROGRAMS.values())
def test_no_timeout_is_near_the_heartbeat(name: str) -> None:
    directive = r"(proxy_(?:read|send)_timeout|timeout (?:client|server|tunnel)) +(\d+)s"
    timeouts = re.findall(directive, (DOCS / name).read_text())
    assert len(timeouts) >= 2
    for timeout, seconds in timeouts:
        assert int(seconds) >= 3 * Settings().heartbeat_seconds, timeout


async def test_connections_are_spread_evenly_over_all_nodes(balancer: Balancer, nodes: Nodes, user: str) -> None:
    async with AsyncExitStack() as stack:
        reached: Counter[str | int] = Counter()
        for _ in range(12):
            opened, node_id = await stack.enter_async_context(arrival(balancer, user))
            assert opened.connection.subprotocol == "anynode.v1"
            await opened.send({"type": "ping"})
            assert (await opened.receive())["type"] == "pong"
            reached[node_id] += 1
    assert reached == dict.fromkeys(nodes.ids, 4)


async def test_a_page_that_the_balancer_served_may_connect_and_no_other(balancer: Balancer, user: str) -> None:
    assert "<html" in balancer.get("/")[1]
    offered = ("anynode.v1", f"bearer.{token_for(user)}")
    async with socket_to(balancer, subprotocols=offered, headers={"Origin": balancer.http}, ready=False) as own:
        assert (await own.receive())["user_id"] == user
    async with socket_to(balancer, subprotocols=offered, headers={"Origin": "http://127.0.0.1"}, ready=False) as other:
        assert await other.closed() == 3003


async def test_logs_hold_paths_and_no_tokens(balancer: Balancer, user: str) -> None:
    token = token_for(user)
    balancer.get("/conversations?token=" + token, user=user)
    async with socket_to(balancer, token=token):
        pass
    async with socket_to(balancer, subprotocols=("anynode.v1", f"bearer.{token}"), ready=False) as opened:
        await opened.receive()

    async def are_logged() -> bool:
        return balancer.logs.count('"GET /ws"') == 2

    await eventually(are_logged)
    assert '"GET /conversations"' in balancer.logs
    assert token.split(".")[1] not in balancer.logs


@pytest.mark.parametrize("path", ["/metrics", "/%6detrics", "/metrics?x", "/./metrics"])
def test_metrics_are_kept_inside(balancer: Balancer, nodes: Nodes, path: str) -> None:
    assert nodes.running[0].get("/metrics")[0] == 200
    assert "anynode" not in balancer.get(path)[1]
    assert balancer.get(path)[0] == 404


def longest_token(user: str) -> str:
    """A token of as many characters as one may have, or up to two less."""
    claims = {"sub": user, "aud": "anynode", "iss": "anynode", "iat": int(time.time()), "exp": int(time.time()) + 600}
    padding = (TOKEN_CHARACTERS_MAX - len(jwt.encode({**claims, "pad": ""}, SECRET))) * 3 // 4
    token = max(
        (jwt.encode({**claims, "pad": "x" * (padding + more)}, SECRET) for more in range(-4, 5)),
        key=lambda token: len(token) if len(token) <= TOKEN_CHARACTERS_MAX else 0,
    )
    assert TOKEN_CHARACTERS_MAX - 2 <= len(token) <= TOKEN_CHARACTERS_MAX
    return token


async def test_the_longest_body_and_the_longest_token_reach_a_node(balancer: Balancer, user: str) -> None:
    async with rest_to(balancer, user, token=longest_token(user)) as rest:
        cookie = {"Cookie": "c=" + "x" * 8000}  # of the same site, which browsers send along
        id = (await rest.ask("POST", "/conversations", {}, headers=cookie)).expect(201)["id"]
        body = json.dumps({"role": "user", "content": "long"}).encode()
        padded = body[:-1] + b" " * (REQUEST_BYTES_MAX - len(body)) + b"}"
        (await rest.ask("POST", f"/conversations/{id}/messages", data=padded)).expect(201)


async def test_a_stream_is_passed_on_as_it_comes(program: str, tmp_path: Path) -> None:
    heads: list[str] = []
    is_first_read = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        if "get /readyz" not in head:
            heads.append(head)
            writer.write(b"data: first\n\n")
            await is_first_read.wait()
            writer.write(b"data: second\n\n")
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server, asyncio.timeout(10):
        with running_balancer(program, tmp_path, [server.sockets[0].getsockname()[1]]) as balancer:
            reader, writer = await asyncio.open_connection("127.0.0.1", balancer.port)
            writer.write(
                b"GET /conversations/c/events?after=1 HTTP/1.1\r\nHost: chat.example:8443\r\n"
                b"Authorization: Bearer a.b.c\r\nLast-Event-ID: 7\r\n"
                b"X-Forwarded-For: 192.0.2.1\r\nX-Forwarded-Proto: https\r\n\r\n"  # a client's own claims
            )
            await reader.readuntil(b"data: first\n\n")
            is_first_read.set()
            await reader.readuntil(b"data: second\n\n")
            writer.close()
            await writer.wait_closed()
    (head,) = heads
    assert head.startswith("get /conversations/c/events?after=1 http/1.1\r\n")
    for line in ("host: chat.example:8443", "authorization: bearer a.b.c", "last-event-id: 7"):
        assert f"\r\n{line}\r\n" in head
    assert "\r\nx-forwarded-for: 127.0.0.1\r\n" in head
    assert head.count("x-forwarded-for") == head.count("x-forwarded-proto") == 1
    assert "\r\nx-forwarded-proto: http\r\n" in head


async def test_a_request_that_died_with_its_node_is_repeated_only_if_idempotent(program: str, tmp_path: Path) -> None:
    left_to_fail = ["POST", "GET"]
    served: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        method, path, _ = (await reader.readuntil(b"\r\n\r\n")).decode().split(" ", 2)
        if path != "/readyz":
            served.append(method)
        if path == "/readyz" or method not in left_to_fail:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        else:
            left_to_fail.remove(method)
        writer.close()
        await writer.wait_closed()

    async def status(balancer: Balancer, method: str) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", balancer.port)
        writer.write(f"{method} / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
        line = await reader.readline()
        writer.close()
        await writer.wait_closed()
        return int(line.split()[1])

    async with AsyncExitStack() as stack, asyncio.timeout(10):
        servers = [
            await stack.enter_async_context(await asyncio.start_server(serve, "127.0.0.1", 0))
            for _ in range(3)  # the balancer may leave two of them out for a while
        ]
        ports = [server.sockets[0].getsockname()[1] for server in servers]
        with running_balancer(program, tmp_path, ports) as balancer:
            assert (await status(balancer, "POST"), served) == (502, ["POST"])
            assert (await status(balancer, "GET"), served) == (200, ["POST", "GET", "GET"])


async def test_a_deploy_is_invisible(program: str, balancer: Balancer, nodes: Nodes, user: str) -> None:
    ids = nodes.ids
    frames: list[Frame] = []
    reached: list[tuple[float, str | int]] = []  # seconds since the drain began, and where to
    leaving_id = ""

    async def is_draining() -> bool:
        return ids[leaving_id].get("/readyz")[0] == 503

    async def arrive_until_it_has_gone() -> None:
        await eventually(is_draining)  # a signal is noticed after up to a tenth of a second
        at = time.monotonic()
        gone_at = None
        while gone_at is None or time.monotonic() < gone_at + 0.5:
            if gone_at is None and ids[leaving_id].process.poll() is not None:
                gone_at = time.monotonic()
            since = time.monotonic() - at
            reached.append((since, await arrive(balancer, user)))
            await asyncio.sleep(0.03)

    async with asyncio.timeout(30), asyncio.TaskGroup() as group, Client([balancer.ws], token_for(user)) as client:
        async for frame in client.send("go"):
            frames.append(frame)
            if not leaving_id and "w20 " in text_of(frames):
                leaving_id = client.node_id
                ids[leaving_id].process.send_signal(signal.SIGTERM)
                group.create_task(arrive_until_it_has_gone())
        assert client.node_id != leaving_id
    assert ids[leaving_id].process.wait() == 0

    assert (frames[-1]["type"], frames[-1]["message"]["content"]) == ("turn.completed", ANSWER)
    assert text_of(frames) == ANSWER
    assert {frame["type"] for frame in frames} == {"message.created", "turn.started", "turn.delta", "turn.completed"}
    assert reached[-1][0] > NOTICED_SECONDS + 0.5
    assert {where for _, where in reached} <= {RESTARTING, *ids} - {leaving_id}
    if Path(program).name == "haproxy":
        assert [since for since, where in reached if where == RESTARTING and since > NOTICED_SECONDS] == []
    else:  # nginx asks nobody, but the next attempt comes to another node, or the one after it
        turned_away = [where == RESTARTING for _, where in reached]
        assert any(turned_away)
        assert not any(map(all, zip(turned_away, turned_away[1:], turned_away[2:], strict=False)))

    nodes.replace_the_ended()
    (back_id,) = nodes.ids.keys() - ids.keys()

    async def is_reached() -> bool:
        return await arrive(balancer, user) == back_id

    await eventually(is_reached, within_seconds=8)


async def test_new_connections_pass_a_dead_node_by(balancer: Balancer, nodes: Nodes, user: str) -> None:
    async with AsyncExitStack() as stack:
        opened = [await stack.enter_async_context(arrival(balancer, user)) for _ in nodes.running]
        ids = nodes.ids
        assert {where for _, where in opened} == set(ids)
        cut, dead_id = opened[0]
        assert isinstance(dead_id, str)
        ids[dead_id].kill()
        assert await cut.closed() == 1006
        others = ids.keys() - {dead_id}
        async with asyncio.timeout(0.9):  # HAProxy would wait a second before it tried the same node again
            assert Counter([await arrive(balancer, user) for _ in range(6)]) == dict.fromkeys(others, 3)
        for still, where in opened:
            if where in others:
                await still.send({"type": "ping"})
                assert (await still.receive())["type"] == "pong"
