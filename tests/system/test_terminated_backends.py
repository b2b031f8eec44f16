"""Postgres keeps ending the connections of its nodes: their turns do not even notice."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import asyncpg
import pytest

from tests.agents.scripted import Strings, script_of
from tests.kit.exactness import Client, assert_exact
from tests.kit.harness import NodeProcess

StartNode = Callable[..., NodeProcess]

TURNS = 20
TOKENS = 500
TOKEN_SECONDS = 0.04
KILL_SECONDS = 0.2
KILLS = 100


@pytest.mark.slow
async def test_turns_stream_on_while_a_backend_is_terminated_every_moment(
    start_node: StartNode, database_url: str, tmp_path: Path, user: str
) -> None:
    environment = Strings(tmp_path / "strings").environment
    nodes = [start_node(**environment) for _ in range(2)]
    script = script_of(("paced", TOKENS, "w{number} of {attempt} ", TOKEN_SECONDS))
    clients = [Client(user, script) for _ in range(TURNS)]
    followers = [client.another() for client in clients]
    async with asyncio.TaskGroup() as group:
        watching = []
        for number, (client, follower) in enumerate(zip(clients, followers, strict=True)):
            here, there = nodes[number % 2], nodes[1 - number % 2]
            # Both ask, and the one that comes first has the turn on its node.
            watching += [group.create_task(client.watch(here)), group.create_task(follower.watch(there))]
        killed = await terminate_backends(database_url, lambda: all(task.done() for task in watching))
    assert killed > KILLS / 2
    text = "".join(f"w{number} of 1 " for number in range(TOKENS))
    for client, follower in zip(clients, followers, strict=True):
        await assert_exact(database_url, [client, follower], epoch=1, text=text)
        assert not client.errors
        assert not follower.errors


async def terminate_backends(database_url: str, is_over: Callable[[], bool]) -> int:
    """Terminate a backend of some node, one after the other. Returns how many."""
    find = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'anynode'"
    killed = 0
    connection = await asyncpg.connect(database_url)
    try:
        for _ in range(KILLS):
            if is_over():
                break
            if found := await connection.fetch(find):
                killed += await connection.fetchval("SELECT pg_terminate_backend($1)", random.choice(found)["pid"])
            await asyncio.sleep(KILL_SECONDS)
    finally:
        await connection.close()
    return killed
