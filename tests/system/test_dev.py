"""`anynode dev --nodes 3`: one address for all nodes, and nodes that are killed and drained by order come back."""

from __future__ import annotations

import asyncio
import http.client
import json
import shutil
import signal
import socket
import tempfile
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Final

import psutil  # type: ignore[import-untyped, unused-ignore]
import pytest
from websockets.asyncio.client import connect

from anynode.server.client.client import Client
from tests.kit.command_line import anynode, wait_until
from tests.kit.dev import Dev, running_dev, successive_free_ports
from tests.kit.harness import NodeProcess, Socket, token_for

WORDS: Final = 60
QUESTION: Final = " ".join(f"word{number}" for number in range(WORDS))
SETTINGS: Final = {"ECHO_TOKENS_PER_SECOND": "40", "LEASE_SECONDS": "1"}


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="anynode-"))
    yield made / "data"
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture(scope="module")
def shared_dev(module_database_url: str, directory: Path) -> Iterator[Dev]:
    """Three nodes and their front, for all tests of the module."""
    with running_dev(directory, nodes=3, DATABASE_URL=module_database_url, **SETTINGS) as dev:
        yield dev


@pytest.fixture
def dev(shared_dev: Dev) -> Dev:
    """The shared dev, once all of its nodes are there."""
    wait_until(lambda: len(ids(shared_dev)) == 3 and set(reached(shared_dev, 3)) == set(ids(shared_dev).values()))
    return shared_dev


def request(url: str, *, token: str | None = None, body: str | None = None) -> tuple[int, Any]:
    """Status and body of a GET, or of a POST where there is something to post."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    asked = urllib.request.Request(url, headers=headers, data=None if body is None else body.encode())
    try:
        with urllib.request.urlopen(asked, timeout=10) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def node_ids(dev: Dev) -> dict[str, str]:
    """The ids of the nodes that are ready, by their URLs."""
    found = {}
    for url in dev.urls:
        try:
            status, said = request(f"{url}/readyz")
        except OSError:
            continue
        if status == 200:
            found[url] = said["node_id"]
    return found


def ids(dev: Dev) -> dict[str, str]:
    """The ids of the nodes that are ready, by their names."""
    return {node_id.rpartition("-")[0]: node_id for node_id in node_ids(dev).values()}


def reached(dev: Dev, times: int) -> list[str]:
    """Return the ids of the nodes to which `times` connections through the load balancer lead."""
    return [request(f"{dev.entry}/livez")[1]["node_id"] for _ in range(times)]


def order(dev: Dev, node_id: str, action: str = "kill", *, url: str | None = None) -> tuple[int, Any]:
    body = json.dumps({"action": action})
    return request(f"{url or dev.entry}/dev/nodes/{node_id}", token=dev.token, body=body)


def assert_is_back(dev: Dev, name: str, old_id: str) -> None:
    """Assert that a node is ready on a port of these nodes, under the same name, and is chosen again."""
    wait_until(lambda: ids(dev).get(name, old_id) != old_id)
    wait_until(lambda: ids(dev)[name] in reached(dev, 3))


# The front.


def test_the_page_is_at_the_front_and_the_terminal_chat_is_given_the_nodes(dev: Dev) -> None:
    said = dev.output.read_text()
    assert f"Open the page      {dev.entry}/#token={dev.token}\n" in said
    assert said.count("/#token=") == 1
    assert "load balancer in front of nodes A, B, C\n" in said
    assert "anynode chat " + " ".join(f"--url {url}" for url in dev.urls) + "\n" in said
    assert f"useChat            {dev.entry.replace('http', 'ws')}/api/chat\n" in said


def test_the_front_leads_to_all_nodes_in_turn(dev: Dev) -> None:
    assert dev.front_port == dev.ports[-1] + 1
    assert Counter(reached(dev, 6)) == dict.fromkeys(ids(dev).values(), 2)
    assert [node_id[:2] for node_id in node_ids(dev).values()] == ["A-", "B-", "C-"]


def test_dev_refuses_to_start_where_the_port_of_its_front_is_taken(module_database_url: str, directory: Path) -> None:
    ports = successive_free_ports(3)
    with closing(socket.create_server(("127.0.0.1", ports[2]))):
        arguments = ("dev", "--nodes", "2", "--data-dir", str(directory))
        result = anynode(*arguments, DATABASE_URL=module_database_url, PORT=str(ports[0]))
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1), result.stderr
    assert f"ports {ports[0]} to {ports[2]} are not all free" in result.stderr


# Orders.


async def test_a_turn_whose_node_is_killed_goes_on_through_the_front(dev: Dev) -> None:
    async with Client([dev.entry.replace("http", "ws")], dev.token) as client:
        frames, killed = [], ""
        async for frame in client.send(QUESTION):
            frames.append(frame)
            if frame["type"] == "turn.delta" and not killed:
                killed = client.node_id
                given = await asyncio.to_thread(order, dev, killed)
                assert given == (202, {"node_id": killed, "action": "kill"})
        assert client.node_id != killed
    assert frames[-1]["type"] == "turn.completed"
    assert frames[-1]["message"]["content"] == f"[1] {QUESTION}"
    text = f"  node {killed[0]} was killed from the page; it starts again in 3 seconds\n"
    assert text in dev.output.read_text()


def idle_connections(dev: Dev, stack: ExitStack) -> dict[str, int]:
    """A connection to each node through the front: the port of its client by the node's id."""
    opened = {}
    for _ in dev.ports:
        connection = stack.enter_context(closing(http.client.HTTPConnection("127.0.0.1", dev.front_port)))
        connection.request("GET", "/livez")
        node_id = json.load(connection.getresponse())["node_id"]
        opened[node_id] = connection.sock.getsockname()[1]
    return opened


def clients_of_the_front(dev: Dev) -> set[int]:
    """The ports of the clients whose connections the front still has."""
    return {
        each.raddr.port
        for each in dev.family()[0].net_connections()
        if each.laddr.port == dev.front_port and each.raddr
    }


def test_a_killed_node_is_cut_off_and_is_back_under_its_name_with_a_new_id(dev: Dev) -> None:
    before = ids(dev)
    with ExitStack() as stack:
        clients = idle_connections(dev, stack)
        assert set(clients.values()) <= clients_of_the_front(dev)
        assert order(dev, before["B"], url=dev.urls[1])[0] == 202  # the node itself passes it on
        gone = clients.pop(before["B"])
        wait_until(lambda: gone not in clients_of_the_front(dev))
        assert set(clients.values()) <= clients_of_the_front(dev)
    assert_is_back(dev, "B", before["B"])
    assert {**ids(dev), "B": before["B"]} == before
    assert request(f"{dev.urls[1]}/livez")[1]["node_id"] == ids(dev)["B"]


async def test_a_drained_node_sends_its_clients_elsewhere_and_is_back(dev: Dev) -> None:
    headers = {"Authorization": f"Bearer {dev.token}"}
    url = dev.entry.replace("http", "ws") + "/ws"
    async with connect(url, subprotocols=["anynode.v1"], additional_headers=headers, proxy=None) as connection:  # type: ignore[list-item]
        client = Socket(connection)
        leaving = (await client.receive())["node_id"]
        assert (await asyncio.to_thread(order, dev, leaving, "drain"))[0] == 202
        assert (await client.receive())["type"] == "goaway"
        assert leaving not in await asyncio.to_thread(reached, dev, 3)
        assert await client.closed() == 1012
    await asyncio.to_thread(assert_is_back, dev, leaving[0], leaving)
    assert f"  node {leaving[0]} drains, as the page has asked; " in dev.output.read_text()


def test_a_lone_node_has_no_front_and_is_back_too(module_database_url: str, directory: Path) -> None:
    with running_dev(directory, DATABASE_URL=module_database_url) as dev:
        (old_id,) = ids(dev).values()
        assert not dev.family()[0].net_connections()  # it listens nowhere
        assert order(dev, old_id)[0] == 202
        assert_is_back(dev, "A", old_id)
        assert dev.process.poll() is None


def test_a_signal_while_a_node_is_to_start_again_stops_everything(module_database_url: str, directory: Path) -> None:
    with running_dev(directory, DATABASE_URL=module_database_url) as dev:
        node = dev.node(dev.ports[0])
        (node_id,) = ids(dev).values()
        assert order(dev, node_id)[0] == 202
        assert not psutil.wait_procs([node], timeout=10)[1]
        dev.process.send_signal(signal.SIGTERM)
        assert dev.process.wait(10) == 0
        assert "Traceback" not in dev.output.read_text()
        with closing(socket.create_server(("127.0.0.1", dev.ports[0]))):
            pass  # so nobody listens there


# What is no order.


def test_without_a_token_nothing_is_ordered(dev: Dev) -> None:
    url, body = f"{dev.entry}/dev/nodes/{ids(dev)['A']}", json.dumps({"action": "kill"})
    for token in (None, "nonsense"):
        status, said = request(url, token=token, body=body)
        assert (status, said["error"]["code"]) == (401, "unauthorized")


@pytest.mark.parametrize("node_id", ["D-00000000", "A", "A-0000000g", "A-00000000%0Akill%20B-00000000", "", "A-0/0"])
def test_an_unknown_node_is_not_found(dev: Dev, node_id: str) -> None:
    status, said = order(dev, node_id)
    assert (status, said["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ('{"action": "pause"}', 422),
        ('{"action": "kill", "more": 1}', 422),
        ("{}", 422),
        ("", 422),
        ("kill", 422),
        ("[]", 422),
        (" " * 1025, 413),
    ],
)
def test_a_body_that_is_no_order_is_refused(dev: Dev, body: str, status: int) -> None:
    assert request(f"{dev.entry}/dev/nodes/{ids(dev)['A']}", token=dev.token, body=body)[0] == status


def test_an_order_is_a_post(dev: Dev) -> None:
    assert request(f"{dev.entry}/dev/nodes/{ids(dev)['A']}", token=dev.token)[0] == 405


def test_a_node_in_production_takes_no_orders(shared_node: NodeProcess, user: str) -> None:
    node_id = request(f"{shared_node.http}/livez")[1]["node_id"]
    url = f"{shared_node.http}/dev/nodes/{node_id}"
    status, said = request(url, token=token_for(user), body=json.dumps({"action": "kill"}))
    assert (status, said["error"]["message"]) == (404, "There is no such route.")
