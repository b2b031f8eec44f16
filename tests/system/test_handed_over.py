"""A turn may be handed over as often as nodes are sent away; only the nodes that died of it count."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path

import pytest

from tests.agents.scripted import Strings, script_of
from tests.conftest import StartNode
from tests.kit.exactness import Client, assert_exact
from tests.kit.harness import TERMINAL, Frame, NodeProcess, Socket, socket_to, sql


@pytest.fixture
def strings(tmp_path: Path) -> Strings:
    return Strings(tmp_path / "strings")


async def follow(socket: Socket, client: Client, until: str) -> None:
    """Go on with what the client has seen, up to the next frame of this type."""
    if client.conversation_id is None:
        await socket.ask(client.content, message_id=client.message_id)
    else:
        await socket.follow(client.conversation_id, client.cursor)
    while not client.frames or client.frames[-1]["type"] != until or client.frames[-1]["seq"] == client.cursors[-1]:
        client.frames.append(await next_of_journal(socket))


async def next_of_journal(socket: Socket) -> Frame:
    while "seq" not in (frame := await socket.receive()):
        assert frame["type"] != "error", frame
    return frame


async def turn_of(database_url: str, client: Client) -> tuple[str, int, int]:
    """Return the status, the epoch and the attempts of a client's turn."""
    (turn,) = await sql(
        database_url,
        "SELECT status, epoch, attempts FROM turns WHERE conversation_id = $1",
        uuid.UUID(client.conversation_id),
    )
    return turn["status"], turn["epoch"], turn["attempts"]


async def test_drains_are_no_attempts_and_deaths_are(
    database_url: str, start_node: StartNode, strings: Strings, user: str
) -> None:
    def start() -> NodeProcess:
        return start_node(**strings.environment, LEASE_SECONDS="300", MAX_ATTEMPTS="1", DRAIN_SECONDS="0")

    def script(gate: str) -> str:
        return script_of(("text", "begun in {attempt} "), ("gate", gate), ("text", "ended in {attempt}"))

    lucky, unlucky = Client(user, script("soon")), Client(user, script("never"))
    node = start()
    for epoch in range(1, 5):
        for client in (lucky, unlucky):
            client.cursors.append(client.cursor)
            async with socket_to(node, user) as socket:
                await follow(socket, client, "turn.delta")
            assert client.text == f"begun in {epoch} "
            assert await turn_of(database_url, client) == ("running", epoch, 1)
        if epoch < 4:
            leaving, node = node, await asyncio.to_thread(start)
            assert await asyncio.to_thread(leaving.stop) == 0
    strings.open("soon")
    async with socket_to(node, user) as socket:
        await follow(socket, lucky, "turn.completed")
    await assert_exact(database_url, [lucky], epoch=4, text="begun in 4 ended in 4")

    dying, node = node, await asyncio.to_thread(start)
    dying.kill()
    await sql(database_url, "UPDATE turns SET lease_expires_at = clock_timestamp() WHERE status = 'running'")
    unlucky.cursors.append(unlucky.cursor)
    async with socket_to(node, user) as socket:
        await follow(socket, unlucky, "turn.failed")
    *_, restarted, end = unlucky.frames
    assert restarted["text"] == end["message"]["content"] == unlucky.text == "begun in 4 "
    assert end["error"]["message"] == "The answer was interrupted 1 times."
    assert end["error"]["retryable"] is True
    assert (await turn_of(database_url, unlucky))[:2] == ("failed", 5)
    assert [frame["type"] for frame in unlucky.frames if frame["type"] in TERMINAL] == ["turn.failed"]
