"""The client of the native protocol leaves when it is told to."""

from __future__ import annotations

import asyncio

import pytest

from anynode.server.client import client as module
from tests.agents.scripted import eventually
from tests.kit.harness import NodeProcess, socket_to, token_for


async def test_a_client_leaves_although_its_inbox_is_full(
    shared_node: NodeProcess, user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "INBOX_FRAMES", 1)
    async with socket_to(shared_node, user) as socket:
        conversation_id = (await socket.answer("hello"))[0]["conversation_id"]
    tasks = asyncio.all_tasks()
    async with asyncio.timeout(30):
        async with module.Client([shared_node.ws], token_for(user)) as client:
            frames = client.follow(conversation_id, after=0)
            assert (await anext(frames))["type"] == "message.created"

            async def is_full() -> bool:
                return client._inbox.full()

            await eventually(is_full)
        await frames.aclose()

        async def has_left_nothing() -> bool:
            return asyncio.all_tasks() == tasks

        await eventually(has_left_nothing)
