"""Every message of `/asyncapi.json` is one that a node really takes or sends, and is as the document says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from anynode.server.reference.asyncapi import asyncapi
from anynode.server.reference.examples import FRAMES
from tests.agents.scripted import Strings, script_of
from tests.kit.harness import TERMINAL, Frame, NodeProcess, Socket, socket_to, token_for

StartNode = Callable[..., NodeProcess]

DOCUMENT = asyncapi()


def validator(name: str) -> jsonschema_rs.Validator:
    """Checks the payload of one message of the document."""
    schema = {**DOCUMENT["components"]["messages"][name]["payload"], "components": DOCUMENT["components"]}
    return jsonschema_rs.Draft202012Validator(schema, validate_formats=True)


def names(operation: str) -> set[str]:
    """The messages of one operation of the document."""
    listed = DOCUMENT["operations"][operation]["messages"]
    return {reference["$ref"].removeprefix("#/channels/socket/messages/") for reference in listed}


class Recorder:
    """Every frame that went either way, by type; each has been checked."""

    def __init__(self) -> None:
        self.sent: dict[str, Frame] = {}
        self.received: dict[str, Frame] = {}
        self._validators = {name: validator(name) for name in DOCUMENT["components"]["messages"]}

    async def send(self, socket: Socket, frame: Frame) -> None:
        """Send a frame that is as the document says."""
        self._validators[frame["type"]].validate(frame)
        self.sent[frame["type"]] = frame
        await socket.send(frame)

    async def take(self, socket: Socket, *types: str, within_seconds: float = 20.0) -> Frame:
        """Take frames up to the first of one of these types, heartbeats included."""
        async with asyncio.timeout(within_seconds):
            while True:
                frame: Frame = json.loads(await socket.connection.recv())
                self._validators[frame["type"]].validate(frame)
                self.received[frame["type"]] = frame
                if frame["type"] in types:
                    return frame

    async def ask(self, socket: Socket, message_id: str, *actions: Any, **fields: Any) -> None:
        """Send a question that is a script."""
        frame = {"type": "message.send", "message_id": message_id, "content": script_of(*actions), **fields}
        await self.send(socket, frame)


@pytest.fixture
def strings(tmp_path: Path) -> Strings:
    return Strings(tmp_path / "strings")


async def test_every_message_of_the_document_is_taken_or_sent_as_it_says(
    start_node: StartNode, strings: Strings, user: str
) -> None:
    settings = {**strings.environment, "HEARTBEAT_SECONDS": "0.3", "LEASE_SECONDS": "1"}
    node, other = start_node(**settings), start_node(**settings)
    record = Recorder()
    async with AsyncExitStack() as stack:
        socket = await stack.enter_async_context(socket_to(node, user, ready=False))
        await record.send(socket, {"type": "auth", "token": token_for(user, ttl_seconds=30)})
        await record.take(socket, "auth.expiring")
        await record.send(socket, {"type": "ping", "request_id": "p"})
        await record.take(socket, "pong")
        await record.take(socket, "heartbeat")

        await record.ask(socket, "m1", ["call", "c1", "tool", {"x": [1]}], ["result", "c1", "tool", "2"], ["text", "a"])
        conversation_id = (await record.take(socket, "turn.completed"))["conversation_id"]
        here = {"conversation_id": conversation_id}
        await record.send(socket, {"type": "turn.regenerate", "message_id": "m1", **here})
        await record.take(socket, "turn.completed")
        await record.send(socket, {"type": "conversation.unfollow", **here})
        await record.send(socket, {"type": "conversation.follow", **here, "after": 3})
        await record.take(socket, "turn.completed")
        await record.send(socket, {"type": "conversation.follow", **here})
        await record.take(socket, "conversation.snapshot")
        await record.send(socket, {"type": "turn.regenerate", "message_id": "not the last", "request_id": "r", **here})
        await record.take(socket, "error")

        await record.ask(socket, "m2", ["hang"], **here)
        await record.take(socket, "turn.started")
        await record.send(socket, {"type": "turn.cancel", **here})
        await record.take(socket, "turn.cancelled")
        await record.ask(socket, "m3", ["agent_error", "no more", True], **here)
        await record.take(socket, "turn.failed")

        elsewhere = await stack.enter_async_context(socket_to(other, user))
        gate = strings.name()
        await record.ask(socket, "m4", ["text", "said "], ["gate", gate], **here)
        await record.take(socket, "turn.delta")
        await record.send(elsewhere, {"type": "conversation.follow", **here})
        await record.take(elsewhere, "conversation.snapshot")
        node.kill()
        await record.take(elsewhere, "turn.restarted")
        strings.open(gate)
        await record.take(elsewhere, *TERMINAL)
        stopping = asyncio.create_task(asyncio.to_thread(other.stop))
        await record.take(elsewhere, "goaway")
        await stopping
    assert set(record.sent) == names("takeFrames")
    assert set(record.received) == names("sendFrames")


def test_the_documents_messages_are_those_of_its_two_operations_and_each_has_an_example() -> None:
    messages = DOCUMENT["components"]["messages"]
    assert names("takeFrames") | names("sendFrames") == set(messages) == set(FRAMES)
    assert DOCUMENT["channels"]["socket"]["messages"].keys() == messages.keys()
    for name, message in messages.items():
        (example,) = message["examples"]
        validator(name).validate(example["payload"])


def test_the_schemas_refuse_what_the_server_refuses() -> None:
    """A schema that lets everything through would make the other tests mean nothing."""
    for name in names("takeFrames"):
        assert not validator(name).is_valid({**FRAMES[name], "unknown": 1})
        assert not validator(name).is_valid({**FRAMES[name], "type": "other"})
    assert not validator("message.send").is_valid({**FRAMES["message.send"], "content": 5})
    assert not validator("turn.completed").is_valid({**FRAMES["turn.completed"], "usage": None})


async def test_a_node_serves_the_document(shared_node: NodeProcess) -> None:
    status, body = await asyncio.to_thread(shared_node.get, "/asyncapi.json")
    assert (status, json.loads(body)) == (200, DOCUMENT)
