"""Heartbeats on the AI SDK's WebSocket: for those who ask for them, and of no request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import AsyncExitStack

import pytest

from tests.agents.scripted import DIRECTORY, Strings
from tests.agents.stepping import AGENT
from tests.conftest import StartNode
from tests.kit.ai_sdk import NO_REQUEST, SUBPROTOCOL, ChatSocket, asking_once, chat_socket, chunks_of, news, shown
from tests.kit.harness import NodeProcess, socket_to, token_for

Nodes = Sequence[NodeProcess]
BEATS = "?heartbeats=true"
HEARTBEAT_SECONDS = 0.1
A = asking_once(("text", "a"))


@pytest.fixture(scope="module")
def environment(strings: Strings) -> dict[str, str]:
    return {"AGENT": AGENT, DIRECTORY: str(strings.directory), "HEARTBEAT_SECONDS": str(HEARTBEAT_SECONDS)}


async def heartbeat(socket: ChatSocket) -> None:
    """Wait for one."""
    assert await socket.next(NO_REQUEST) == {"type": "heartbeat", "requestId": ""}


async def for_ever(socket: ChatSocket) -> None:
    """Take heartbeats as long as they come. Raises TimeoutError when four are missed."""
    while True:
        await socket.next(NO_REQUEST, within_seconds=5 * HEARTBEAT_SECONDS)


async def test_heartbeats_come_where_they_are_asked_for_and_stop_nothing(
    nodes: Nodes, strings: Strings, user: str, chat: str, gate: str
) -> None:
    async with AsyncExitStack() as stack:
        sockets = [await stack.enter_async_context(chat_socket(node, user, query=BEATS)) for node in nodes]
        readies = [await socket.next(NO_REQUEST) for socket in sockets]
        assert [frame["type"] for frame in readies] == ["ready"] * 2
        assert [frame["heartbeat_seconds"] for frame in readies] == [HEARTBEAT_SECONDS] * 2
        assert len({frame["node_id"] for frame in readies}) == 2
        asked = await sockets[0].ask(chat, asking_once(("text", "a"), ("gate", gate), ("text", "b")))
        begun = await sockets[0].until(asked, "text-delta")
        waits = await sockets[1].wait(chat, "none")
        assert await sockets[1].rest(waits) == news(waits)
        for socket in sockets:
            for _ in range(3):
                await heartbeat(socket)
        strings.open(gate)
        last = shown(chunks_of([*begun, *await sockets[0].rest(asked)]))
        assert (last.text, last.finish_reason) == ("ab", "stop")
        waits = await sockets[1].wait(chat, str(last.id))
        for _ in range(3):
            await heartbeat(sockets[1])
        await sockets[0].answer(chat, A)
        assert await sockets[1].rest(waits) == news(waits)


async def test_a_client_that_authenticates_by_a_frame_is_told_the_node_first(
    nodes: Nodes, user: str, chat: str
) -> None:
    async with chat_socket(nodes[0], None, subprotocols=(SUBPROTOCOL,), query=BEATS) as socket:
        headers = {"authorization": f"Bearer {token_for(user)}"}
        request = await socket.resume(chat, headers=headers)
        frames = [json.loads(await socket.connection.recv()) for _ in range(2)]
        assert [(frame["type"], frame["requestId"]) for frame in frames] == [("ready", ""), ("no-active", request)]


async def test_while_a_connection_is_busy_there_are_no_heartbeats(
    start_node: StartNode, environment: dict[str, str], strings: Strings, user: str, chat: str, gate: str
) -> None:
    node = start_node(**{**environment, "HEARTBEAT_SECONDS": "1"})
    async with chat_socket(node, user, query=BEATS) as socket, socket_to(node, user) as native:
        asked = await socket.ask(chat, asking_once(("chatter", gate)))
        for _ in range(3):  # of one that is not
            async with asyncio.timeout(15):
                while json.loads(await native.connection.recv())["type"] != "heartbeat":
                    pass
        strings.open(gate)
        await socket.rest(asked)
        assert [frame["type"] for frame in socket.left(NO_REQUEST)] == ["ready"]


@pytest.mark.parametrize("query", ["", "?heartbeats", "?heartbeats=1", "?heartbeats=TRUE", BEATS + "&heartbeats=no"])
async def test_who_does_not_ask_for_heartbeats_has_none(nodes: Nodes, user: str, query: str) -> None:
    async with chat_socket(nodes[0], user, query=query) as socket, chat_socket(nodes[0], user, query=BEATS) as other:
        socket.has_heartbeats = False
        await other.next(NO_REQUEST)
        for _ in range(5):
            await heartbeat(other)
        await socket.sync()
        assert not socket.left()


async def test_a_node_that_is_frozen_sends_no_heartbeats_and_its_client_leaves_it(
    start_node: StartNode, environment: dict[str, str], strings: Strings, user: str, chat: str, gate: str
) -> None:
    frozen, other = start_node(**environment), start_node(**environment)
    async with chat_socket(frozen, user, query=BEATS) as socket, chat_socket(other, user, query=BEATS) as elsewhere:
        assert (await socket.next(NO_REQUEST))["type"] == "ready"
        request = await elsewhere.ask(chat, asking_once(("text", "a"), ("gate", gate), ("text", "b")))
        await elsewhere.until(request, "text-delta")
        resumed = await socket.resume(chat)
        await socket.until(resumed, "text-delta")
        await heartbeat(socket)
        frozen.pause()
        with pytest.raises(TimeoutError):
            await for_ever(socket)
        resumed = await elsewhere.resume(chat)
        strings.open(gate)
        assert shown(chunks_of((await elsewhere.rest(resumed))[1:])).text == "ab"
        frozen.resume()
        await heartbeat(socket)


async def test_nothing_of_all_this_was_an_error_of_the_nodes(nodes: Nodes) -> None:
    for node in nodes:
        assert "Traceback" not in node.log.read_text()
