"""A node hears of turns that begin elsewhere, whatever the cluster and the connections have been through."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from anynode.server.engine.watch import BEGUN_MAX
from tests.agents.scripted import Strings, eventually, script_of
from tests.conftest import StartNode
from tests.kit.harness import TERMINAL, Frame, NodeProcess, socket_to, sql, text_of
from tests.kit.postgres_proxy import PostgresProxy, postgres_proxy


@pytest.fixture
def strings(tmp_path: Path) -> Strings:
    return Strings(tmp_path / "strings")


@pytest.fixture
def proxy(database_url: str) -> Iterator[PostgresProxy]:
    with postgres_proxy(database_url) as running:
        yield running


async def has_watched(proxy: PostgresProxy, times: int) -> None:
    """Wait until the node has had answers to `times` watches that it asked from now on."""
    executions = proxy.executions("watch")

    async def condition() -> bool:
        return proxy.executions("watch") > executions + times

    await eventually(condition)


async def test_idle_followers_hear_of_turns_and_of_nothing_else_in_a_cluster_that_was_restored_from_another(
    database_url: str, proxy: PostgresProxy, start_node: StartNode, user: str
) -> None:
    here, other = start_node(proxy.url), start_node()
    async with socket_to(other, user) as elsewhere, socket_to(here, user) as socket:
        first = await elsewhere.answer("hello")
        conversation_id = first[0]["conversation_id"]
        # The other cluster had come further than this one.
        await sql(database_url, "UPDATE conversations SET changed_xid = (2^50)::bigint")
        await sql(
            database_url,
            "INSERT INTO conversations (id, user_id, changed_xid) "
            "SELECT gen_random_uuid(), $1, (2^50)::bigint + n FROM generate_series(1, $2::int) n",
            user,
            BEGUN_MAX + 1,
        )
        await socket.follow(conversation_id, first[-1]["seq"])
        await socket.send({"type": "ping"})
        assert (await socket.receive())["type"] == "pong"
        await has_watched(proxy, 2)
        readings = proxy.executions("read_events")
        await has_watched(proxy, 4)
        assert proxy.executions("read_events") == readings
        for content in ("once", "twice"):
            asked = await elsewhere.answer(content, conversation_id)
            heard = await socket.until(*TERMINAL)
            assert [frame["type"] for frame in heard if frame["type"] != "turn.delta"] == [
                *("message.created", "turn.started", "turn.completed")
            ]
            assert heard[-1] == asked[-1]
            assert text_of(heard) == text_of(asked) != ""


async def test_a_turn_that_began_elsewhere_is_heard_of_though_the_end_of_the_last_one_here_was_not_yet_known(
    database_url: str, proxy: PostgresProxy, start_node: StartNode, strings: Strings, user: str
) -> None:
    settings = {**strings.environment, "LEASE_SECONDS": "300"}
    here, other = start_node(proxy.url, **settings), start_node(**settings)
    async with socket_to(here, user) as socket, socket_to(other, user) as elsewhere:
        await socket.ask(script_of(("text", "one "), ("gate", "go"), ("text", "ended")))
        frames = await socket.until("turn.delta")
        conversation_id = frames[0]["conversation_id"]
        ending = proxy.hold("after", "flush_with_endings")
        strings.open("go")
        await ending.reached()
        # It is committed, and nobody here knows; elsewhere the next turn begins and ends, and is heard of.
        second = await elsewhere.answer(script_of(("text", "two")), conversation_id)
        assert second[-1]["type"] == "turn.completed"
        await has_watched(proxy, 2)
        # Then Postgres is away for so long that anything may have been missed.
        again = proxy.hold("before", "flush_with_endings")
        proxy.cut()
        await eventually(lambda: says(here, "the watch waits for Postgres"))
        proxy.heal()
        await has_watched(proxy, 2)
        await again.reached()
        again.release()
        frames += await socket.until(*TERMINAL)
        frames += await socket.until(*TERMINAL)
    assert here.metric("anynode_turns_lost_total") == 0
    assert [frame["seq"] for frame in frames] == sorted({frame["seq"] for frame in frames})
    shown = [frame for frame in frames if frame["type"] != "turn.delta"]
    assert [frame["type"] for frame in shown] == ["message.created", "turn.started", "turn.completed"] * 2
    assert ends_of(frames) == ["one ended", "two"]
    assert frames[-1] == second[-1]
    (row,) = await sql(
        database_url,
        "SELECT array_agg(content ORDER BY position) AS said FROM messages WHERE conversation_id = $1 "
        "AND role = 'assistant'",
        uuid.UUID(conversation_id),
    )
    assert row["said"] == ends_of(frames)


async def says(node: NodeProcess, words: str) -> bool:
    """Whether its log has these words."""
    return words in await asyncio.to_thread(node.log.read_text)


def ends_of(frames: list[Frame]) -> list[str]:
    """The answers in turns' ends."""
    return [frame["message"]["content"] for frame in frames if frame["type"] in TERMINAL]
