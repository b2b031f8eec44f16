"""Everything works with PgBouncer in transaction mode between the nodes and Postgres, and few connections to share."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from anynode.models.schema_version import missing_migrations
from tests.agents.scripted import eventually
from tests.kit.harness import TERMINAL, Frame, NodeProcess, Socket, socket_to, sql, text_of, with_database
from tests.kit.pgbouncer import PgBouncer, running_pgbouncer

StartNode = Callable[..., NodeProcess]

ROOT = Path(__file__).parents[2]
POOL_SIZE = 4
TURNS = 40
OURS = "datname = current_database() AND application_name = 'anynode'"


@pytest.fixture(scope="module")
def pgbouncer(postgres_url: str) -> Iterator[PgBouncer]:
    with running_pgbouncer(postgres_url, pool_size=POOL_SIZE) as running:
        yield running


@pytest.fixture
def own_pgbouncer(postgres_url: str) -> Iterator[PgBouncer]:
    """One for a test that ends it."""
    with running_pgbouncer(postgres_url, pool_size=POOL_SIZE) as running:
        yield running


@pytest.fixture
def narrow_pgbouncer(postgres_url: str) -> Iterator[PgBouncer]:
    """One with a single connection for all."""
    with running_pgbouncer(postgres_url, pool_size=1) as running:
        yield running


@pytest.fixture
def empty_database_url(postgres_url: str) -> Iterator[str]:
    name = f"test_{uuid.uuid4().hex}"
    asyncio.run(sql(postgres_url, f"CREATE DATABASE {name}"))
    yield with_database(postgres_url, name)
    asyncio.run(sql(postgres_url, f"DROP DATABASE {name} WITH (FORCE)"))


async def count(database_url: str, backends: str) -> int:
    """How many of the server's processes are such, past the pooler."""
    rows = await sql(database_url, f"SELECT count(*) FROM pg_stat_activity WHERE {backends}")
    return int(rows[0]["count"])


async def assert_the_database_holds(database_url: str, frames: list[Frame], turns: int = 1) -> None:
    """The last of the turns, which a client was shown in whole, is in the database: its answer, and all events."""
    conversation_id = uuid.UUID(frames[-1]["conversation_id"])
    rows = await sql(
        database_url,
        "SELECT role, content, status FROM messages WHERE conversation_id = $1 ORDER BY position DESC LIMIT 1",
        conversation_id,
    )
    assert [tuple(row) for row in rows] == [("assistant", text_of(frames), "completed")]
    events = await sql(
        database_url, "SELECT seq, type FROM events WHERE conversation_id = $1 ORDER BY seq", conversation_id
    )
    assert [row["seq"] for row in events] == list(range(1, frames[-1]["seq"] + 1))
    assert [row["type"] for row in events if row["type"] in TERMINAL] == ["turn.completed"] * turns


def test_migrations_at_once_share_a_single_connection(narrow_pgbouncer: PgBouncer, empty_database_url: str) -> None:
    url = narrow_pgbouncer.url(empty_database_url)
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "anynode.server.cli", "migrate"],
            cwd=ROOT,
            env={"PATH": os.environ["PATH"], "DATABASE_URL": url},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(4)
    ]
    try:
        outputs = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * 4, outputs
    assert len([output for output in outputs if output.startswith("applied 0001_initial\n")]) == 1
    assert outputs.count("the schema is up to date\n") == 3
    assert asyncio.run(missing_migrations(url)) == asyncio.run(missing_migrations(empty_database_url)) == []


async def test_many_turns_at_once_on_two_nodes_answer_right(
    start_node: StartNode, pgbouncer: PgBouncer, database_url: str
) -> None:
    nodes = [start_node(pgbouncer.url(database_url), ECHO_TOKENS_PER_SECOND="100") for _ in range(2)]
    busiest = 0

    async def converse(number: int) -> None:
        asked = [f"{turn} of {number}: " + " ".join(f"word{word * number}" for word in range(20)) for turn in (1, 2)]
        async with socket_to(nodes[number % 2], f"user-{number}") as socket:
            first = await socket.answer(asked[0])
            conversation_id = first[-1]["conversation_id"]
            second = await socket.answer(asked[1], conversation_id)
        assert text_of(first) == f"[1] {asked[0]}"
        assert text_of(second) == f"[3] {asked[1]}"
        await assert_the_database_holds(database_url, second, turns=2)
        async with socket_to(nodes[(number + 1) % 2], f"user-{number}") as socket:
            await socket.follow(conversation_id, 0)
            again = [frame for _ in range(2) for frame in await socket.until(*TERMINAL)]
        assert text_of([frame for frame in again if frame["seq"] <= first[-1]["seq"]]) == text_of(first)
        assert [frame for frame in again if frame["type"] != "turn.delta"] == [
            frame for frame in first + second if frame["type"] != "turn.delta"
        ]

    async def watch() -> None:
        nonlocal busiest
        while True:
            busiest = max(busiest, await count(database_url, OURS))
            await asyncio.sleep(0.05)

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(converse(number) for number in range(TURNS)))
    watching.cancel()
    # They had to share, or nothing is proven; and the application's name came through.
    assert 1 < busiest <= POOL_SIZE
    assert ["Traceback" in node.log.read_text() for node in nodes] == [False, False]
    assert ["behind a pooler" in node.log.read_text() for node in nodes] == [True, True]


async def streaming(socket: Socket, deltas: int) -> list[Frame]:
    """Ask, and return the frames up to a number of deltas."""
    await socket.ask("go")
    frames = []
    for _ in range(deltas):
        frames += await socket.until("turn.delta")
    return frames


WORDS = 200
PACE = {"ECHO_TOKENS": str(WORDS), "ECHO_TOKENS_PER_SECOND": "100", "LEASE_SECONDS": "20"}
ANSWER = "".join(f"w{number} " for number in range(WORDS))


async def test_turns_outlive_the_servers_processes(
    start_node: StartNode, pgbouncer: PgBouncer, database_url: str, user: str
) -> None:
    node = start_node(pgbouncer.url(database_url), **PACE)
    async with socket_to(node, user) as socket:
        frames = await streaming(socket, 1)
        killed = 0
        for _ in range(5):
            rows = await sql(database_url, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {OURS}")
            killed += len(rows)
            frames += await socket.until("turn.delta")
        frames += await socket.until(*TERMINAL)
    assert killed >= 5
    assert text_of(frames) == frames[-1]["message"]["content"] == ANSWER
    assert "turn.restarted" not in [frame["type"] for frame in frames]
    await assert_the_database_holds(database_url, frames)


async def test_turns_outlive_the_pooler(
    start_node: StartNode, own_pgbouncer: PgBouncer, database_url: str, user: str
) -> None:
    node = start_node(own_pgbouncer.url(database_url), **PACE)
    async with socket_to(node, user) as socket:
        frames = await streaming(socket, 1)
        for _ in range(3):
            own_pgbouncer.kill()
            assert (await asyncio.to_thread(node.get, "/readyz"))[0] == 503
            await asyncio.to_thread(own_pgbouncer.start)
            frames += await socket.until("turn.delta")
        frames += await socket.until(*TERMINAL)
    assert text_of(frames) == frames[-1]["message"]["content"] == ANSWER
    assert "turn.restarted" not in [frame["type"] for frame in frames]
    await assert_the_database_holds(database_url, frames)


async def test_a_paused_node_leaves_no_transaction_open_and_loses_its_turns_to_another(
    start_node: StartNode, pgbouncer: PgBouncer, database_url: str
) -> None:
    environment = {"ECHO_TOKENS": "100000", "ECHO_TOKENS_PER_SECOND": "1000", "FLUSH_INTERVAL_MS": "1"}
    node, other = (start_node(pgbouncer.url(database_url), LEASE_SECONDS="2", **environment) for _ in range(2))

    async def has_all_ended() -> bool:
        return await count(database_url, f"{OURS} AND backend_xid IS NOT NULL") == 0

    async def is_taken_over() -> bool:
        return await asyncio.to_thread(other.metric, "anynode_turns_taken_over_total") == 2

    async with socket_to(node, "ada") as ada, socket_to(node, "bob") as bob:
        await streaming(ada, 1)
        await streaming(bob, 1)
        for _ in range(20):  # in ever other moments of its statements
            node.pause()
            try:
                await eventually(has_all_ended, within_seconds=5)
            finally:
                node.resume()
            await ada.until("turn.delta")
        node.pause()
        await eventually(is_taken_over)
