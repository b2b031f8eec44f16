"""A node that Postgres does not hear of, or hears of too late: it stops by itself, harms nothing, and comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.agents.scripted import Strings, eventually, script_of
from tests.kit.exactness import Client, assert_exact
from tests.kit.harness import NodeProcess, running_node, sql
from tests.kit.postgres_proxy import PostgresProxy, postgres_proxy

pytestmark = pytest.mark.slow
StartNode = Callable[..., NodeProcess]


@pytest.fixture
def strings(tmp_path: Path) -> Strings:
    return Strings(tmp_path / "strings")


@pytest.fixture
def proxy(database_url: str) -> Iterator[PostgresProxy]:
    with postgres_proxy(database_url) as running:
        yield running


@pytest.fixture
def start(strings: Strings, tmp_path: Path) -> Iterator[StartNode]:
    with ExitStack() as stack:

        def start_node(url: str, **settings: str) -> NodeProcess:
            return stack.enter_context(running_node(url, tmp_path, {**strings.environment, **settings}))

        yield start_node


def has_text(client: Client, text: str) -> Callable[[], Awaitable[object]]:
    async def condition() -> bool:
        return client.text == text

    return condition


def has_marks(strings: Strings, name: str, *attempts: int) -> Callable[[], Awaitable[object]]:
    async def condition() -> bool:
        return strings.marks(name) == list(attempts)

    return condition


def has_lost(node: NodeProcess, turns: int) -> Callable[[], Awaitable[object]]:
    async def condition() -> bool:
        return await asyncio.to_thread(node.metric, "anynode_turns_lost_total") == turns

    return condition


@pytest.mark.parametrize("is_silent", [False, True], ids=["refused", "silent"])
async def test_a_node_cut_off_from_postgres_stops_before_another_goes_on_and_its_clients_miss_nothing(
    database_url: str, proxy: PostgresProxy, start: StartNode, strings: Strings, user: str, *, is_silent: bool
) -> None:
    script = (
        ("mark", "order"),
        ("text", "begun in {attempt} "),
        ("gate", "cut"),
        ("text", "went on in {attempt} "),
        ("mark", "went on"),
        ("stuck", "order", 1),
        ("gate", "healed"),
        ("text", "ended in {attempt}"),
    )
    cut_off, other = start(proxy.url, LEASE_SECONDS="3"), start(database_url, LEASE_SECONDS="3")
    client, remote = Client(user, script_of(*script)), Client(user, script_of(*script[1:5], *script[6:]))
    elsewhere, remote_here = client.another(), remote.another()
    async with asyncio.TaskGroup() as group:
        group.create_task(client.watch(cut_off))
        group.create_task(remote.watch(other))
        for begun in (client, remote):
            await eventually(has_text(begun, "begun in 1 "))
        group.create_task(elsewhere.watch(other))
        group.create_task(remote_here.watch(cut_off))
        for begun in (elsewhere, remote_here):
            await eventually(has_text(begun, "begun in 1 "))
        if is_silent:
            proxy.black_hole()
        else:
            proxy.cut()
        strings.open("cut")
        await eventually(has_text(elsewhere, "begun in 2 went on in 2 "))
        # It began, it stopped, and only then another began.
        assert strings.marks("order") == [1, 1, 2]

        async def are_told() -> bool:
            return all(told.errors for told in (client, remote_here))

        await eventually(are_told)
        assert not elsewhere.errors
        proxy.heal()  # in the silent case, what the lost attempt said last reaches Postgres only now
        for told in (client, remote_here):
            await eventually(has_text(told, elsewhere.text if told is client else remote.text))
        strings.open("healed")
    for told in (client, remote_here):
        assert {error["code"] for error in told.errors} == {"database_unavailable"}
        assert {error["conversation_id"] for error in told.errors} == {told.conversation_id}
    await assert_exact(database_url, [client, elsewhere], epoch=2, text="begun in 2 went on in 2 ended in 2")
    await assert_exact(database_url, [remote, remote_here], epoch=1, text="begun in 1 went on in 1 ended in 1")
    assert cut_off.metric("anynode_turns_lost_total") == 1
    assert cut_off.metric("anynode_turns_running") == 0


async def test_a_cut_shorter_than_the_lease_restarts_nothing(
    database_url: str, proxy: PostgresProxy, start: StartNode, strings: Strings, user: str
) -> None:
    script = (
        ("text", "begun in {attempt} "),
        ("gate", "cut"),
        ("paced", 20, "w{number} of {attempt} ", 0.01),
        ("mark", "said"),
        ("gate", "healed"),
        ("text", "ended in {attempt}"),
    )
    node = start(proxy.url, LEASE_SECONDS="60")
    client = Client(user, script_of(*script))
    async with asyncio.TaskGroup() as group:
        group.create_task(client.watch(node))
        await eventually(has_text(client, "begun in 1 "))
        proxy.cut()
        strings.open("cut")
        await eventually(has_marks(strings, "said", 1))
        assert client.text == "begun in 1 "
        proxy.heal()
        strings.open("healed")
    text = "begun in 1 " + "".join(f"w{number} of 1 " for number in range(20)) + "ended in 1"
    await assert_exact(database_url, [client], epoch=1, text=text)
    assert client.errors == []


async def test_statements_whose_outcome_is_lost_are_repeated_and_count_once(
    database_url: str, proxy: PostgresProxy, start: StartNode, user: str
) -> None:
    # The first flush has two events, the next ones have one.
    script = script_of(("text", "begun in {attempt} "), ("call", "1", "tool", {}), ("paced", 10, "w{number} ", 0.01))
    node = start(proxy.url, LEASE_SECONDS="60")
    for statement in ("admit", "flush_one", "flush", "flush_with_endings"):
        client = Client(user, script)
        async with asyncio.TaskGroup() as group:
            hold = proxy.hold("after", statement)
            group.create_task(client.watch(node))
            await hold.reached()
            executions = proxy.executions(statement)
            proxy.cut()
            proxy.heal()
        assert proxy.executions(statement) > executions
        text = "begun in 1 " + "".join(f"w{number} " for number in range(10))
        await assert_exact(database_url, [client], epoch=1, text=text)
        assert client.errors == []
    assert node.metric("anynode_turns_lost_total") == 0


async def test_an_end_that_a_frozen_node_has_under_way_is_refused_and_its_clients_go_on_when_it_thaws(
    database_url: str, proxy: PostgresProxy, start: StartNode, strings: Strings, user: str
) -> None:
    # The second attempt has said nothing yet when the first one's end arrives: no seq of it is taken.
    script = (
        ("mark", "begun"),
        ("hold", "thawed", 2),
        ("text", "begun in {attempt} "),
        ("gate", "go"),
        ("text", "ended in {attempt}"),
    )
    frozen, other = start(proxy.url, LEASE_SECONDS="1"), start(database_url, LEASE_SECONDS="1")
    client = Client(user, script_of(*script))
    elsewhere = client.another()
    async with asyncio.TaskGroup() as group:
        group.create_task(client.watch(frozen))
        await eventually(has_text(client, "begun in 1 "))
        sent, answered = proxy.hold("before", "flush_with_endings"), proxy.hold("after", "flush_with_endings")
        strings.open("go")
        await sent.reached()
        frozen.pause()
        group.create_task(elsewhere.watch(other))
        await eventually(has_marks(strings, "begun", 1, 2))
        sent.release()
        await answered.reached()
        answered.release()
        frozen.resume()
        await eventually(has_lost(frozen, 1))
        await eventually(has_text(client, ""))
        strings.open("thawed")
    await assert_exact(database_url, [client, elsewhere], epoch=2, text="begun in 2 ended in 2")


@pytest.mark.parametrize("nodes", [1, 2])
async def test_an_admission_that_a_node_hears_of_after_the_turn_was_taken_over(
    database_url: str, proxy: PostgresProxy, start: StartNode, strings: Strings, user: str, nodes: int
) -> None:
    script = (("mark", "begun"), ("text", "begun in {attempt} "), ("gate", "go"), ("text", "ended in {attempt}"))
    late = start(proxy.url, LEASE_SECONDS="1")
    client = Client(user, script_of(*script))
    async with asyncio.TaskGroup() as group:
        hold = proxy.hold("after", "admit")
        group.create_task(client.watch(late))
        await hold.reached()
        if nodes == 2:
            late.pause()  # so that it does not take over what it has not heard of itself
            start(database_url, LEASE_SECONDS="1")
        await eventually(has_marks(strings, "begun", 2))
        late.resume()
        hold.release()
        await eventually(has_text(client, "begun in 2 "))
        await outlive_leases(database_url, 2)
        strings.open("go")
    await assert_exact(database_url, [client], epoch=2, text="begun in 2 ended in 2")


async def outlive_leases(database_url: str, count: int) -> None:
    """Wait until the database's clock has moved on by `count` leases of a second."""
    began = (await sql(database_url, "SELECT clock_timestamp() AS now"))[0]["now"]

    async def has_passed() -> bool:
        now = (await sql(database_url, "SELECT clock_timestamp() AS now"))[0]["now"]
        return bool((now - began).total_seconds() > count)

    await eventually(has_passed)
