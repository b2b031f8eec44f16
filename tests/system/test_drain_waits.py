"""A drain waits for what has not begun yet: turns whose admission or takeover the node is only about to hear of."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from tests.agents.scripted import Strings, eventually, script_of
from tests.conftest import StartNode
from tests.kit.exactness import Client, assert_exact
from tests.kit.harness import NodeProcess, socket_to, sql
from tests.kit.postgres_proxy import PostgresProxy, postgres_proxy

SCRIPT = script_of(("text", "begun in {attempt} "), ("gate", "go"), ("text", "ended in {attempt}"))


@pytest.fixture
def strings(tmp_path: Path) -> Strings:
    return Strings(tmp_path / "strings")


@pytest.fixture
def environment(strings: Strings) -> dict[str, str]:
    """Neither a lease nor a drain runs out within the test's time."""
    return {**strings.environment, "LEASE_SECONDS": "300", "DRAIN_SECONDS": "300"}


@pytest.fixture
def proxy(database_url: str) -> Iterator[PostgresProxy]:
    with postgres_proxy(database_url) as running:
        yield running


def has_text(client: Client, text: str) -> Callable[[], Awaitable[object]]:
    async def condition() -> bool:
        return client.text == text

    return condition


def has_left(client: Client) -> Callable[[], Awaitable[object]]:
    """Whether it has been sent away by its first node."""

    async def condition() -> bool:
        return len(client.cursors) == 1

    return condition


async def stays(node: NodeProcess, proxy: PostgresProxy) -> None:
    """Wait for so long that a node which had nothing to wait for would have gone."""
    watches = proxy.executions("watch")

    async def is_there() -> bool:
        assert node.process.poll() is None, "it has gone, and leaves a turn to its lease"
        return proxy.executions("watch") > watches + 8

    await eventually(is_there)


async def test_a_turn_that_is_just_being_admitted_runs_to_its_end(
    database_url: str,
    proxy: PostgresProxy,
    start_node: StartNode,
    environment: dict[str, str],
    strings: Strings,
    user: str,
) -> None:
    leaving, other = start_node(proxy.url, **environment), start_node(**environment)
    client = Client(user, SCRIPT)
    async with asyncio.TaskGroup() as group:
        hold = proxy.hold("after", "admit")
        group.create_task(client.watch(leaving, other))
        await hold.reached()
        leaving.process.send_signal(signal.SIGTERM)
        await eventually(has_left(client))
        await stays(leaving, proxy)
        hold.release()
        await eventually(has_text(client, "begun in 1 "))
        strings.open("go")
    assert await asyncio.to_thread(leaving.process.wait, 30) == 0
    await assert_exact(database_url, [client], epoch=1, text="begun in 1 ended in 1")
    assert other.metric("anynode_turns_taken_over_total") == 0


async def test_a_turn_that_is_just_being_taken_over_is_not_left_to_its_lease(
    database_url: str,
    proxy: PostgresProxy,
    start_node: StartNode,
    environment: dict[str, str],
    strings: Strings,
    user: str,
) -> None:
    dying, leaving, other = start_node(**environment), start_node(proxy.url, **environment), start_node(**environment)
    client = Client(user, SCRIPT)
    async with asyncio.TaskGroup() as group:
        group.create_task(client.watch(dying, other))
        await eventually(has_text(client, "begun in 1 "))
        other.pause()  # so that only the one that leaves can take the turn over
        dying.kill()
        taking, taken = proxy.hold("before", "take_over"), proxy.hold("after", "take_over")
        await taking.reached()
        await sql(database_url, "UPDATE turns SET lease_expires_at = clock_timestamp()")
        taking.release()
        await taken.reached()
        async with socket_to(leaving, user) as socket:
            leaving.process.send_signal(signal.SIGTERM)
            assert await socket.closed() == 1012
        await stays(leaving, proxy)
        taken.release()
        other.resume()
        strings.open("go")
        assert await asyncio.to_thread(leaving.process.wait, 30) == 0

        async def is_over() -> bool:
            return bool(client.frames[-1]["type"] == "turn.completed")

        await eventually(is_over)
    (turn,) = await sql(database_url, "SELECT epoch FROM turns")
    epoch = turn["epoch"]
    assert epoch > 1  # it may end on the one that leaves, or be handed over once more
    await assert_exact(database_url, [client], epoch=epoch, text=f"begun in {epoch} ended in {epoch}")
