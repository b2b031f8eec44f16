"""What a follower costs while nothing happens, and what is left of a connection that has closed: next to nothing."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from tests.agents.measuring import ENVIRONMENT
from tests.agents.scripted import eventually
from tests.kit.harness import NodeProcess, Socket, running_node, socket_to, sql, text_of
from tests.kit.rest import rest_to

FOLLOWERS = 100
IDLE_KIB_MAX = 40
LARGE = 64_000  # characters of a message; a snapshot has 2 MiB of them


@pytest.fixture(scope="module")
def node(module_database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    with running_node(module_database_url, tmp_path_factory.mktemp("node"), ENVIRONMENT) as node:
        yield node


async def conversation_of(database_url: str, user: str, messages: int, characters: int) -> str:
    """Make a conversation with messages of this length."""
    id = uuid.uuid4()
    await sql(database_url, "INSERT INTO users (id) VALUES ($1) ON CONFLICT DO NOTHING", user)
    await sql(database_url, "INSERT INTO conversations (id, user_id) VALUES ($1, $2)", id, user)
    await sql(
        database_url,
        "INSERT INTO messages (id, conversation_id, user_id, position, role, content) SELECT gen_random_uuid(), $1, "
        "$2, n, CASE n % 2 WHEN 1 THEN 'user' ELSE 'assistant' END, repeat('x', $4) FROM generate_series(1, $3) n",
        id,
        user,
        messages,
        characters,
    )
    return str(id)


class Meter:
    """Asks the node's agent what there is."""

    def __init__(self, socket: Socket) -> None:
        self._socket = socket

    async def read(self, question: str = "now") -> dict[str, int]:
        """What the node holds; see `tests.agents.measuring`."""
        found: dict[str, int] = json.loads(text_of(await self._socket.answer(question)))
        return found


@asynccontextmanager
async def meter_of(node: NodeProcess) -> AsyncIterator[Meter]:
    """A meter on a connection of its own."""
    async with socket_to(node, "meter") as socket:
        yield Meter(socket)


async def follow_by_socket(stack: AsyncExitStack, node: NodeProcess, user: str, conversation_id: str) -> None:
    socket = await stack.enter_async_context(socket_to(node, user))
    await socket.follow(conversation_id)
    assert len((await socket.until("conversation.snapshot"))[-1]["messages"]) > 1


async def follow_by_stream(stack: AsyncExitStack, node: NodeProcess, user: str, conversation_id: str) -> None:
    rest = await stack.enter_async_context(rest_to(node, user))
    stream = await stack.enter_async_context(rest.events(conversation_id))
    await stream.until("conversation.snapshot")


@pytest.mark.parametrize("follow", [follow_by_socket, follow_by_stream])
async def test_a_follower_that_was_shown_a_snapshot_keeps_nothing_of_it(
    node: NodeProcess, module_database_url: str, user: str, follow: Any
) -> None:
    conversation_id = await conversation_of(module_database_url, user, 200, 2000)
    async with meter_of(node) as meter, AsyncExitStack() as stack:
        for _ in range(FOLLOWERS // 5):  # what the first ones cost is there only once
            await follow(stack, node, user, conversation_id)
        await meter.read()
        before = await meter.read()
        for _ in range(FOLLOWERS):
            await follow(stack, node, user, conversation_id)
        after = await meter.read()
    assert after["Snapshot"] == 0
    assert (after["kib"] - before["kib"]) / FOLLOWERS <= IDLE_KIB_MAX


@pytest.mark.parametrize("follow", [follow_by_socket, follow_by_stream])
async def test_what_a_closed_connection_held_is_freed_without_the_garbage_collector(
    node: NodeProcess, module_database_url: str, user: str, follow: Any
) -> None:
    conversation_id = await conversation_of(module_database_url, user, 100, LARGE)
    async with meter_of(node) as meter:
        before = await meter.read("uncollected")
        for _ in range(12):
            async with AsyncExitStack() as stack:
                await follow(stack, node, user, conversation_id)

        async def is_all_freed() -> bool:
            now = await meter.read("uncollected")
            found = {name: now[name] - before[name] for name in before if name != "kib"}
            return set(found.values()) == {0}

        await eventually(is_all_freed, within_seconds=5)
