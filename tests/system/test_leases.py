"""A node stops what it is told is another's, takes a turn over once, and none while it drains."""

from __future__ import annotations

import asyncio
import signal
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.agents.scripted import Strings, eventually, script_of
from tests.conftest import StartNode
from tests.kit.harness import NodeProcess, socket_to, sql
from tests.kit.postgres_proxy import postgres_proxy


@pytest.fixture
def strings(tmp_path: Path) -> Strings:
    return Strings(tmp_path / "strings")


def has_marks(strings: Strings, name: str, *attempts: int) -> Callable[[], Awaitable[object]]:
    async def condition() -> bool:
        return strings.marks(name) == list(attempts)

    return condition


async def test_an_agent_that_says_nothing_is_stopped_although_its_lease_would_last(
    start_node: StartNode, database_url: str, strings: Strings, user: str
) -> None:
    node = start_node(**strings.environment, LEASE_SECONDS="300")
    async with socket_to(node, user) as socket:
        await socket.ask(script_of(("text", "begun"), ("stuck", "stopped", 1)))
        await socket.until("turn.delta")
        await sql(database_url, "UPDATE turns SET node = 'another', epoch = 2")
        await eventually(has_marks(strings, "stopped", 1))
    assert await asyncio.to_thread(node.metric, "anynode_turns_lost_total") == 1
    turns = await sql(database_url, "SELECT status, epoch, node FROM turns")
    assert [tuple(turn) for turn in turns] == [("running", 2, "another")]


async def test_a_takeover_whose_answer_comes_late_is_not_made_again(
    start_node: StartNode, database_url: str, strings: Strings, user: str
) -> None:
    script = (("mark", "begun"), ("text", "begun"), ("gate", "go"))
    with postgres_proxy(database_url) as proxy:
        first = start_node(**strings.environment, LEASE_SECONDS="300")
        second = start_node(proxy.url, **strings.environment, LEASE_SECONDS="10")
        await begin(first, user, *script)
        first.kill()
        taking, taken = proxy.hold("before", "take_over"), proxy.hold("after", "take_over")
        await taking.reached()
        await sql(database_url, "UPDATE turns SET lease_expires_at = clock_timestamp()")
        taking.release()
        await taken.reached()

        async def is_two_beats_old() -> object:  # and good for several seconds more, on a busy machine too
            statement = "SELECT FROM turns WHERE lease_expires_at < clock_timestamp() + interval '7.5 seconds'"
            return await sql(database_url, statement)

        await eventually(is_two_beats_old)
        takeovers = proxy.executions("take_over")
        taken.release()

        async def has_looked_again() -> bool:
            return proxy.executions("take_over") > takeovers + 2

        await eventually(has_looked_again)
        strings.open("go")
        await eventually(is_over(database_url))
        assert strings.marks("begun") == [1, 2]
        assert second.metric("anynode_turns_taken_over_total") == 1


def is_over(database_url: str) -> Callable[[], Awaitable[object]]:
    async def condition() -> object:
        return await sql(database_url, "SELECT FROM turns WHERE status = 'completed'")

    return condition


async def test_a_node_that_drains_takes_no_turn_over(
    start_node: StartNode, database_url: str, strings: Strings, user: str
) -> None:
    environment = {**strings.environment, "LEASE_SECONDS": "1", "DRAIN_SECONDS": "60"}
    draining, dying = start_node(**environment), start_node(**environment)
    script = (("mark", "begun"), ("text", "begun"), ("gate", "go"))
    kept = await begin(draining, user, *script)
    left = await begin(dying, user, *script)
    draining.process.send_signal(signal.SIGTERM)

    async def is_draining() -> bool:
        return (await asyncio.to_thread(draining.get, "/readyz"))[0] == 503

    await eventually(is_draining)
    dying.kill()

    async def has_been_lapsed_for_two_beats() -> object:
        statement = "SELECT FROM turns WHERE conversation_id = $1 AND lease_expires_at < now() - interval '2 seconds'"
        return await sql(database_url, statement, left)

    await eventually(has_been_lapsed_for_two_beats)
    start_node(**environment)
    await eventually(has_marks(strings, "begun", 1, 1, 2))
    strings.open("go")
    assert await asyncio.to_thread(draining.process.wait, 20) == 0
    epochs = {row["conversation_id"]: row["epoch"] for row in await sql(database_url, "SELECT * FROM turns")}
    assert epochs == {kept: 1, left: 2}


async def begin(node: NodeProcess, user: str, *script: tuple[object, ...]) -> uuid.UUID:
    """Begin a turn on a node, and leave; returns the conversation."""
    async with socket_to(node, user) as socket:
        await socket.ask(script_of(*script))
        return uuid.UUID((await socket.until("turn.delta"))[0]["conversation_id"])
