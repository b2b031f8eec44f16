"""A node is killed at every point that matters, and not a letter is lost, said twice, or made up."""

from __future__ import annotations

import asyncio
import signal
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.agents.scripted import Strings, eventually, script_of
from tests.kit.exactness import Client, assert_exact
from tests.kit.harness import NodeProcess, running_node, sql
from tests.kit.postgres_proxy import Hold, PostgresProxy, When, postgres_proxy

BEGUN = ("text", "begun in {attempt} ")
REST = (("paced", 20, "w{number} of {attempt} ", 0.01), ("text", "ended in {attempt}"))
LEASE_SECONDS = "1"  # of the nodes whose turns are to be taken over soon
LONG_LEASE_SECONDS = "300"  # what is taken over within the test's time cannot have waited for it

StartNode = Callable[..., NodeProcess]


@dataclass(frozen=True)
class Point:
    """The point where a node dies: the nth execution of a statement, with some turns, which end under this epoch."""

    when: When
    statement: str
    epoch: int
    nth: int = 1
    turns: int = 1

    def __str__(self) -> str:
        return f"{self.when} {self.statement}" + (f" {self.nth}" if self.nth > 1 else "")

    def hold(self, proxy: PostgresProxy) -> Hold:
        return proxy.hold(self.when, self.statement, nth=self.nth)


@pytest.fixture(scope="module")
def other(
    module_database_url: str, strings: Strings, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[NodeProcess]:
    """The node that goes on."""
    environment = {**strings.environment, "LEASE_SECONDS": LEASE_SECONDS}
    with running_node(module_database_url, tmp_path_factory.mktemp("node"), environment) as node:
        yield node


@pytest.fixture
def proxy(module_database_url: str) -> Iterator[PostgresProxy]:
    with postgres_proxy(module_database_url) as running:
        yield running


@pytest.fixture
def start(strings: Strings, tmp_path: Path) -> Iterator[StartNode]:
    """Starts nodes that are to die."""
    with ExitStack() as stack:

        def start_node(url: str, **settings: str) -> NodeProcess:
            environment = {**strings.environment, "LEASE_SECONDS": LEASE_SECONDS, **settings}
            return stack.enter_context(running_node(url, tmp_path, environment))

        yield start_node


def answer_of(epoch: int) -> str:
    """What an attempt says."""
    return f"begun in {epoch} " + "".join(f"w{number} of {epoch} " for number in range(20)) + f"ended in {epoch}"


def has_begun(client: Client) -> Callable[[], Awaitable[object]]:
    async def condition() -> bool:
        return any(frame["type"] == "turn.delta" for frame in client.frames)

    return condition


POINTS = (
    Point("before", "admit", epoch=1),
    Point("after", "admit", epoch=2),
    Point("before", "flush_one", epoch=2, nth=2),
    Point("after", "flush_one", epoch=2, nth=2),
    Point("before", "flush", epoch=2, turns=2),
    Point("after", "flush", epoch=2, turns=2),
    Point("before", "flush_with_endings", epoch=2),
    Point("after", "flush_with_endings", epoch=1),
)


@pytest.mark.parametrize("point", POINTS, ids=str)
async def test_a_node_that_dies_in_a_turn(
    point: Point, module_database_url: str, proxy: PostgresProxy, start: StartNode, other: NodeProcess, user: str
) -> None:
    dying = start(proxy.url)
    hold = point.hold(proxy)
    clients = [Client(user, script_of(BEGUN, *REST)) for _ in range(point.turns)]
    elsewhere = clients[0].another()
    async with asyncio.TaskGroup() as group:
        for client in clients:
            group.create_task(client.watch(dying, other))
        await hold.reached()
        group.create_task(elsewhere.watch(other))
        dying.kill()
    for client in clients:
        all_of_it = [client, elsewhere] if client is clients[0] else [client]
        await assert_exact(module_database_url, all_of_it, epoch=point.epoch, text=answer_of(point.epoch))


TAKEOVER_POINTS = (
    Point("before", "take_over", epoch=2),
    Point("after", "take_over", epoch=3),
    Point("after", "flush_one", epoch=3),
)


@pytest.mark.parametrize("point", TAKEOVER_POINTS, ids=str)
async def test_a_node_that_dies_while_it_takes_a_turn_over(
    point: Point,
    module_database_url: str,
    proxy: PostgresProxy,
    start: StartNode,
    other: NodeProcess,
    strings: Strings,
    gate: str,
    user: str,
) -> None:
    first, second = start(module_database_url, LEASE_SECONDS=LONG_LEASE_SECONDS), start(proxy.url)
    client = Client(user, script_of(BEGUN, ("gate", gate), *REST))
    elsewhere = client.another()
    async with asyncio.TaskGroup() as group:
        group.create_task(client.watch(first, second, other))
        await eventually(has_begun(client))
        other.pause()  # so that only the second one can take the turn over
        first.kill()
        strings.open(gate)
        taking = proxy.hold("before", "take_over")
        hold = taking if point is TAKEOVER_POINTS[0] else point.hold(proxy)
        await taking.reached()
        await end_lease(module_database_url, client)
        if hold is not taking:
            taking.release()
        await hold.reached()
        second.kill()
        other.resume()
        group.create_task(elsewhere.watch(other))
    await assert_exact(module_database_url, [client, elsewhere], epoch=point.epoch, text=answer_of(point.epoch))


async def end_lease(database_url: str, client: Client) -> None:
    assert client.conversation_id is not None
    statement = "UPDATE turns SET lease_expires_at = clock_timestamp() WHERE conversation_id = $1"
    await sql(database_url, statement, uuid.UUID(client.conversation_id))


async def test_a_node_that_hears_of_its_takeover_after_another_one_has_made_it_too(
    module_database_url: str,
    proxy: PostgresProxy,
    start: StartNode,
    other: NodeProcess,
    strings: Strings,
    gate: str,
    user: str,
) -> None:
    first = start(module_database_url, LEASE_SECONDS=LONG_LEASE_SECONDS)
    late = start(proxy.url, LEASE_SECONDS=LONG_LEASE_SECONDS)  # or it would no longer listen
    client = Client(user, script_of(BEGUN, ("gate", gate), *REST))
    elsewhere = client.another()
    async with asyncio.TaskGroup() as group:
        group.create_task(client.watch(first, late))
        await eventually(has_begun(client))
        other.pause()
        first.kill()
        taking, taken = proxy.hold("before", "take_over"), proxy.hold("after", "take_over")
        await taking.reached()
        await end_lease(module_database_url, client)
        taking.release()
        await taken.reached()
        await end_lease(module_database_url, client)
        other.resume()
        group.create_task(elsewhere.watch(other))

        async def is_taken_again() -> bool:
            return elsewhere.text == "begun in 3 "

        await eventually(is_taken_again)
        taken.release()

        async def is_given_up() -> bool:
            return await asyncio.to_thread(late.metric, "anynode_turns_lost_total") == 1

        await eventually(is_given_up)
        strings.open(gate)
    await assert_exact(module_database_url, [client, elsewhere], epoch=3, text=answer_of(3))


DRAIN_POINTS = (
    Point("before", "flush_one", epoch=2),
    Point("after", "flush_with_endings", epoch=1),
)


@pytest.mark.parametrize("point", DRAIN_POINTS, ids=str)
async def test_a_node_that_dies_while_it_finishes_its_turns_for_a_drain(
    point: Point,
    module_database_url: str,
    proxy: PostgresProxy,
    start: StartNode,
    other: NodeProcess,
    strings: Strings,
    gate: str,
    user: str,
) -> None:
    draining = start(proxy.url, DRAIN_SECONDS="60")
    client = Client(user, script_of(BEGUN, ("gate", gate), *REST))
    async with asyncio.TaskGroup() as group:
        group.create_task(client.watch(draining, other))
        await eventually(has_begun(client))
        draining.process.send_signal(signal.SIGTERM)

        async def has_been_sent_away() -> bool:
            return bool(client.cursors)

        await eventually(has_been_sent_away)
        hold = point.hold(proxy)
        strings.open(gate)
        await hold.reached()
        draining.kill()
    await assert_exact(module_database_url, [client], epoch=point.epoch, text=answer_of(point.epoch))


@pytest.mark.parametrize(("when", "lease_seconds"), [("before", LEASE_SECONDS), ("after", LONG_LEASE_SECONDS)])
async def test_a_node_that_dies_while_it_hands_its_turns_over(
    when: When,
    lease_seconds: str,
    module_database_url: str,
    proxy: PostgresProxy,
    start: StartNode,
    other: NodeProcess,
    strings: Strings,
    gate: str,
    user: str,
) -> None:
    draining = start(proxy.url, DRAIN_SECONDS="0", LEASE_SECONDS=lease_seconds)
    client = Client(user, script_of(BEGUN, ("gate", gate), *REST))
    async with asyncio.TaskGroup() as group:
        group.create_task(client.watch(draining, other))
        await eventually(has_begun(client))
        hold = proxy.hold(when, "release")
        draining.process.send_signal(signal.SIGTERM)
        await hold.reached()
        draining.kill()
        strings.open(gate)
    await assert_exact(module_database_url, [client], epoch=2, text=answer_of(2))
