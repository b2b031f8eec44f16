"""A connection to Postgres that falls silent costs an attempt on another one, and no turn."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.agents.scripted import Strings, eventually, script_of
from tests.conftest import StartNode
from tests.kit.exactness import Client, assert_exact
from tests.kit.harness import sql
from tests.kit.postgres_proxy import postgres_proxy


@pytest.fixture
def strings(tmp_path: Path) -> Strings:
    return Strings(tmp_path / "strings")


async def test_a_turn_outlives_the_silence_of_each_connection_of_its_node(
    database_url: str, start_node: StartNode, strings: Strings, user: str
) -> None:
    statements = ("renew", "take_over", "flush_one", "flush_with_endings")
    with postgres_proxy(database_url) as proxy:
        node = start_node(proxy.url, **strings.environment, LEASE_SECONDS="4")
        script = (("text", "begun in {attempt} "), ("gate", "go"), ("text", "went on "), ("gate", "end"))
        client = Client(user, script_of(*script, ("text", "ended in {attempt}")))
        async with asyncio.TaskGroup() as group:
            group.create_task(client.watch(node))

            async def has_begun() -> bool:
                return client.text == "begun in 1 "

            await eventually(has_begun)
            (began,) = await sql(database_url, "SELECT lease_expires_at FROM turns")
            holds = [proxy.hold("before", statement) for statement in statements]
            strings.open("go")
            for hold in holds[:3]:  # none of them is ever released
                await hold.reached()

            async def has_outlived_its_lease() -> bool:
                (turn,) = await sql(
                    database_url,
                    "SELECT clock_timestamp() > $1 AND lease_expires_at > clock_timestamp() AS has FROM turns",
                    began["lease_expires_at"],
                )
                return bool(turn["has"]) and client.text == "begun in 1 went on "

            await eventually(has_outlived_its_lease)
            strings.open("end")
            await holds[3].reached()
        await assert_exact(database_url, [client], epoch=1, text="begun in 1 went on ended in 1")
        assert node.metric("anynode_turns_lost_total") == 0
