"""A node takes over turns that are its own already: it knows of its earlier attempt, or has not heard of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from tests.agents.scripted import Strings, eventually, script_of
from tests.conftest import StartNode
from tests.kit.exactness import Client, assert_exact
from tests.kit.harness import sql
from tests.kit.postgres_proxy import PostgresProxy, postgres_proxy

LONG_LEASE = {"LEASE_SECONDS": "300"}  # what happens within the test's time has not waited for one
END_LEASES = "UPDATE turns SET lease_expires_at = clock_timestamp() - interval '1 second'"


@pytest.fixture
def strings(tmp_path: Path) -> Strings:
    return Strings(tmp_path / "strings")


@pytest.fixture
def proxy(database_url: str) -> Iterator[PostgresProxy]:
    with postgres_proxy(database_url) as running:
        yield running


def has_text(client: Client, text: str) -> Callable[[], Awaitable[object]]:
    async def condition() -> bool:
        return client.text == text

    return condition


def has_marks(strings: Strings, name: str, *attempts: int) -> Callable[[], Awaitable[object]]:
    async def condition() -> bool:
        return strings.marks(name) == list(attempts)

    return condition


async def test_the_earlier_attempt_is_stopped_and_its_followers_go_on_with_the_next(
    database_url: str, proxy: PostgresProxy, start_node: StartNode, strings: Strings, user: str
) -> None:
    node = start_node(proxy.url, **strings.environment, **LONG_LEASE)
    script = (("text", "begun in {attempt} "), ("stuck", "stopped", 1), ("gate", "go"), ("text", "ended in {attempt}"))
    client = Client(user, script_of(*script))
    clients = [client, client.another(), client.another()]
    async with asyncio.TaskGroup() as group:
        for told in clients:
            group.create_task(told.watch(node))
            await eventually(has_text(told, "begun in 1 "))
        # Renewals wait, so that the lease that SQL ends stays ended until the takeover, which does not wait with them.
        taking = proxy.hold("before", "take_over")
        await taking.reached()
        renewing = proxy.hold("before", "renew")
        await renewing.reached()
        await sql(database_url, END_LEASES)
        taking.release()
        await eventually(has_marks(strings, "stopped", 1))
        for told in clients:
            await eventually(has_text(told, "begun in 2 "))
        # What is renewed now is the lease of the attempt that was; the next one is none the worse for it.
        renewing.release()
        renewals = proxy.executions("renew")

        async def is_renewed() -> bool:
            return proxy.executions("renew") > renewals

        await eventually(is_renewed)
        strings.open("go")
    await assert_exact(database_url, clients, epoch=2, text="begun in 2 ended in 2")
    assert strings.marks("stopped") == [1]
    assert node.metric("anynode_turns_lost_total") == 1
    assert node.metric("anynode_turns_running") == 0


async def test_a_takeover_whose_answer_is_lost_is_made_again_long_before_its_lease_runs_out(
    database_url: str, proxy: PostgresProxy, start_node: StartNode, strings: Strings, user: str
) -> None:
    script = (("mark", "begun"), ("text", "begun in {attempt} "), ("gate", "go"), ("text", "ended in {attempt}"))
    first = start_node(**strings.environment, **LONG_LEASE)
    second = start_node(proxy.url, **strings.environment, **LONG_LEASE)
    client = Client(user, script_of(*script))
    elsewhere = client.another()
    async with asyncio.TaskGroup() as group:
        group.create_task(client.watch(first, second))
        await eventually(has_text(client, "begun in 1 "))
        group.create_task(elsewhere.watch(second))
        await eventually(has_text(elsewhere, "begun in 1 "))
        first.kill()
        taking, taken = proxy.hold("before", "take_over"), proxy.hold("after", "take_over")
        await taking.reached()
        await sql(database_url, END_LEASES)
        taking.release()
        await taken.reached()
        proxy.cut()
        (turn,) = await sql(database_url, "SELECT node, epoch, lease_expires_at > clock_timestamp() AS held FROM turns")
        assert (turn["epoch"], turn["held"]) == (2, True)
        # Two beats of a shorter lease; of this one, half is left.
        await sql(database_url, "UPDATE turns SET lease_expires_at = clock_timestamp() + interval '150 seconds'")
        proxy.heal()
        for told in (client, elsewhere):
            await eventually(has_text(told, "begun in 3 "))
        assert (await sql(database_url, "SELECT node FROM turns"))[0]["node"] == turn["node"]
        # From now on it is known, and renewed.
        takeovers = proxy.executions("take_over")

        async def has_looked_again() -> bool:
            return proxy.executions("take_over") > takeovers + 1

        await eventually(has_looked_again)
        strings.open("go")
    await assert_exact(database_url, [client, elsewhere], epoch=3, text="begun in 3 ended in 3")
    assert strings.marks("begun") == [1, 3]


async def test_a_node_that_was_frozen_with_no_other_there_goes_on_with_its_turn_itself(
    database_url: str, start_node: StartNode, strings: Strings, user: str
) -> None:
    node = start_node(**strings.environment, LEASE_SECONDS="2")
    client = Client(user, script_of(("text", "begun in {attempt} "), ("gate", "go"), ("text", "ended in {attempt}")))
    clients = [client, client.another()]
    async with asyncio.TaskGroup() as group:
        for told in clients:
            group.create_task(told.watch(node))
            await eventually(has_text(told, "begun in 1 "))
        node.pause()

        async def has_lapsed() -> bool:
            (turn,) = await sql(database_url, "SELECT lease_expires_at < clock_timestamp() AS has_lapsed FROM turns")
            return bool(turn["has_lapsed"])

        await eventually(has_lapsed)
        node.resume()

        async def have_been_told() -> bool:
            return all(told.text not in ("", "begun in 1 ") for told in clients)

        await eventually(have_been_told)
        strings.open("go")
    (turn,) = await sql(database_url, "SELECT epoch FROM turns")
    epoch = turn["epoch"]
    assert epoch > 1
    await assert_exact(database_url, clients, epoch=epoch, text=f"begun in {epoch} ended in {epoch}")
