"""The sockets of a node: who may connect, and how all of them are sent elsewhere."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from anynode.server import metrics
from anynode.server.engine.node import Node
from anynode.server.settings import Settings
from anynode.server.transport.connection import Connection
from anynode.server.transport.websocket import Sockets, WebSocketEndpoint
from tests.kit.asgi import Peer, websocket_scope

FORBIDDEN = (3003, "pages of this origin may not connect (ALLOWED_ORIGINS)")
RESTARTING = (1012, "restarting")
OVERLOADED = (1013, "this node is at its limit of connections")


class Leaving:
    """A connection that keeps what it is told when its node goes down."""

    def __init__(self, order: list[str], name: str) -> None:
        self._order = order
        self._name = name

    def warn_of_drain(self, deadline: float) -> None:
        self._order.append(f"warn {self._name} {deadline:g}")

    def close_soon(self, code: int, reason: str) -> None:
        self._order.append(f"close {self._name} {code:d} {reason}")


def sockets_of(*, is_draining: bool = False, **settings: Any) -> Sockets:
    node = cast(Node, SimpleNamespace(is_draining=is_draining))
    return Sockets(Settings(**settings), node)


@pytest.mark.parametrize(
    ("origin", "refusal"),
    [
        (None, None),  # not a browser
        ("https://chat.example", None),  # the server's own page
        ("http://chat.example", None),
        ("https://CHAT.example", None),
        ("https://app.example", None),  # in ALLOWED_ORIGINS
        ("https://APP.example", None),
        ("http://app.example", FORBIDDEN),
        ("https://app.example:8443", FORBIDDEN),
        ("https://evil.example", FORBIDDEN),
        ("https://chat.example.evil.example", FORBIDDEN),
        ("null", FORBIDDEN),
        ("", FORBIDDEN),
        ("https://[", FORBIDDEN),
        ("https://a.wide.example", None),  # by the wildcard
        ("https://wide.example", FORBIDDEN),
        ("capacitor://localhost", None),  # an app
        ("javascript://chat.example", FORBIDDEN),  # the server's own host, and no origin of a page
        ("https://chat.example/path", FORBIDDEN),
        ("https://chat.example?query", FORBIDDEN),
        ("https://chat.example#fragment", FORBIDDEN),
        ("https://evil@chat.example", FORBIDDEN),
    ],
)
def test_pages_connect_from_the_servers_own_and_from_allowed_origins(
    origin: str | None, refusal: tuple[int, str] | None
) -> None:
    headers = {"Host": "Chat.example", **({} if origin is None else {"Origin": origin})}
    sockets = sockets_of(allowed_origins=("https://app.example", "https://*.wide.example", "capacitor://localhost"))
    assert sockets.refusal(websocket_scope(headers=headers)) == refusal


@pytest.mark.parametrize("origin", ["null", "", "https://"])
def test_an_origin_without_a_host_is_not_the_one_of_a_request_without_a_host(origin: str) -> None:
    assert sockets_of().refusal(websocket_scope(headers={"Origin": origin})) == FORBIDDEN
    assert sockets_of().refusal(websocket_scope(headers={"Origin": origin, "Host": ""})) == FORBIDDEN


def test_a_node_that_drains_sends_clients_elsewhere() -> None:
    assert sockets_of(is_draining=True).refusal(websocket_scope()) == RESTARTING


def test_a_node_has_as_many_connections_as_it_may() -> None:
    sockets = sockets_of(connections_max=2)
    for number in range(2):
        assert sockets.refusal(websocket_scope()) is None
        sockets.connections.add(cast(Connection, Leaving([], f"{number}")))
    assert sockets.refusal(websocket_scope()) == OVERLOADED


def test_what_cannot_be_helped_by_another_node_is_said_first() -> None:
    sockets = sockets_of(is_draining=True, connections_max=0)
    assert sockets.refusal(websocket_scope(headers={"Origin": "https://evil.example"})) == FORBIDDEN
    assert sockets.refusal(websocket_scope()) == RESTARTING


async def test_a_node_that_goes_away_warns_everybody_before_it_closes_anybody() -> None:
    sockets, order = sockets_of(), list[str]()
    for name in "abc":
        sockets.connections.add(cast(Connection, Leaving(order, name)))
    await sockets.go_away(17.0, 0.0)
    assert sorted(order[:3]) == ["warn a 17", "warn b 17", "warn c 17"]
    assert sorted(order[3:]) == [f"close {name} 1012 restarting" for name in "abc"]


async def test_closings_are_spread_over_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr("anynode.server.transport.websocket.asyncio", SimpleNamespace(sleep=sleep))
    sockets = sockets_of()
    for name in "abcd":
        sockets.connections.add(cast(Connection, Leaving([], name)))
    await sockets.go_away(17.0, 2.0)
    assert pauses == [0.5] * 4
    sockets.connections.clear()
    await sockets.go_away(17.0, 2.0)  # nobody is there: it takes no time
    assert pauses == [0.5] * 4


@pytest.mark.parametrize("error", [None, KeyError("broken")])
async def test_a_connection_is_counted_while_it_runs(error: Exception | None) -> None:
    sockets = sockets_of(connections_max=1)
    counted: list[tuple[int, float]] = []
    before = metrics.connections._value.get()

    class Counting:
        """A connection that looks at what is counted, and ends."""

        def __init__(self, *arguments: Any, refusal: tuple[int, str] | None) -> None:
            self.refusal = refusal

        async def run(self) -> None:
            counted.append((len(sockets.connections), metrics.connections._value.get() - before))
            if error is not None:
                raise error

    made: list[Counting] = []

    def connect(*arguments: Any, **options: Any) -> Connection:
        made.append(Counting(*arguments, **options))
        return cast(Connection, made[-1])

    endpoint, peer = WebSocketEndpoint(sockets, connect), Peer()
    sockets.connections.add(cast(Connection, Leaving([], "first")))
    try:
        await endpoint(websocket_scope(), peer.receive, peer.send)
    except KeyError:
        assert error is not None
    assert made[0].refusal == OVERLOADED
    assert counted == [(2, 1)]
    assert len(sockets.connections) == 1
    assert metrics.connections._value.get() == before
    assert asyncio.all_tasks() == {asyncio.current_task()}
