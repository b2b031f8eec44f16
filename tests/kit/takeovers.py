"""What clients have seen of a turn that went on at another node, and that it is right."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Sequence

import asyncpg

from tests.kit.exactness import Client, assert_journal, assert_shown
from tests.kit.harness import sql
from tests.kit.stored import messages_of


def has(client: Client, *types: str) -> Callable[[], Awaitable[object]]:
    """Whether the client's last frames are of these types."""

    async def condition() -> bool:
        return [frame["type"] for frame in client.frames][-len(types) :] == list(types)

    return condition


def has_text_after_result(client: Client) -> bool:
    """Whether the client has seen the tool's result and then some text."""
    types = [frame["type"] for frame in client.frames]
    return "turn.tool_result" in types and types[-1] == "turn.delta"


def epoch_of(client: Client) -> int:
    """The epoch of the last event that the client has seen."""
    return max((frame["epoch"] for frame in client.frames if frame["type"] == "turn.restarted"), default=1)


async def assert_right(
    database_url: str, clients: Sequence[Client], *, epoch: int | None = None
) -> Sequence[asyncpg.Record]:
    """All clients of one conversation have seen all of its one turn, each event once and in order; its journal is
    gapless and holds one end; what clients show is what the messages hold, whose roles are in order. Returns them."""
    conversation_id = clients[0].conversation_id
    assert conversation_id is not None
    turns = await sql(
        database_url, "SELECT status, epoch FROM turns WHERE conversation_id = $1", uuid.UUID(conversation_id)
    )
    events = await sql(
        database_url,
        "SELECT seq, type, epoch, turn_id::text AS turn_id, payload::text AS payload, c.last_seq "
        "FROM events e JOIN conversations c ON c.id = conversation_id WHERE c.id = $1 ORDER BY seq",
        uuid.UUID(conversation_id),
    )
    messages = await messages_of(database_url, conversation_id)
    ((status, last_epoch),) = turns
    assert status == "completed"
    assert epoch in (None, last_epoch)
    assert_journal(events, last_epoch)
    said = [message["content"] for message in messages if message["role"] == "assistant"]
    for client in clients:
        assert client.conversation_id == conversation_id
        assert_shown(events, client.frames)
        assert client.text == "".join(said)
        assert client.frames[-1]["message"]["content"] == said[-1]
        assert not client.errors
    return messages
