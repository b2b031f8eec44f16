"""A turn whose journal cannot be read any more ends as failed, and keeps no other from being taken over."""

from __future__ import annotations

import asyncio
import json
import uuid
from pathlib import Path

import pytest

from tests.agents.scripted import Strings, eventually, script_of
from tests.conftest import StartNode
from tests.kit.exactness import Client, assert_exact
from tests.kit.harness import TERMINAL, socket_to, sql, text_of

LONG_LEASE = {"LEASE_SECONDS": "300"}  # what happens within the test's time has not waited for one

# What makes it so: the event, the place in its payload, what comes there.
CORRUPTIONS = (
    ("turn.tool_result", "tool_call_id", 7),
    ("turn.tool_result", "tool_name", None),
    ("turn.tool_result", "content", ["a list"]),
    ("turn.tool_call", "tool_call_id", 7),
    ("turn.tool_call", "arguments", None),
    ("turn.delta", "text", 7),
    ("turn.delta", "text", None),
)


@pytest.fixture
def strings(tmp_path: Path) -> Strings:
    return Strings(tmp_path / "strings")


async def test_a_turn_that_cannot_be_read_fails_and_the_others_go_on(
    database_url: str, start_node: StartNode, strings: Strings, user: str
) -> None:
    script = (
        *(("text", "before {attempt} "), ("call", "1", "tool", {"a": 1}), ("result", "1", "tool", "found"), ("step",)),
        *(("text", "after {attempt} "), ("gate", "go"), ("text", "ended in {attempt}")),
    )
    plain = (("text", "begun in {attempt} "), ("gate", "go"), ("text", "ended in {attempt}"))
    dying = start_node(**strings.environment, **LONG_LEASE)
    other = start_node(**strings.environment, **LONG_LEASE)
    unreadable = [Client(user, script_of(*script)) for _ in CORRUPTIONS]
    good = [Client(user, script_of(*plain)) for _ in range(2)]
    async with asyncio.TaskGroup() as group:
        # Turns are taken over in the order of their ids: the good ones are the first and the last.
        for client in (good[0], *unreadable, good[1]):
            group.create_task(client.watch(dying, other))

            async def has_said_something(client: Client = client) -> bool:
                return client.text in ("before 1 after 1 ", "begun in 1 ")

            await eventually(has_said_something)
        for client, (type, field, value) in zip(unreadable, CORRUPTIONS, strict=True):
            changed = await sql(
                database_url,
                "UPDATE events SET payload = CASE WHEN $4::jsonb IS NULL THEN payload - $3::text "
                "ELSE jsonb_set(payload, ARRAY[$3::text], $4) END "
                "WHERE conversation_id = $1 AND seq = (SELECT min(seq) FROM events WHERE conversation_id = $1 "
                "AND type = $2) RETURNING seq",
                uuid.UUID(client.conversation_id),
                type,
                field,
                None if value is None else json.dumps(value),
            )
            assert len(changed) == 1
        dying.kill()
        await sql(database_url, "UPDATE turns SET lease_expires_at = clock_timestamp()")

        async def have_begun_again() -> bool:
            return all(client.text == "begun in 2 " for client in good)

        await eventually(have_begun_again)
        strings.open("go")
    for client in good:
        await assert_exact(database_url, [client], epoch=2, text="begun in 2 ended in 2")
    for client in unreadable:
        *_, restarted, end = client.frames
        assert (restarted["type"], restarted["epoch"], end["type"]) == ("turn.restarted", 2, "turn.failed")
        assert "cannot be read" in end["error"]["message"]
        assert client.text == restarted["text"]
        await assert_is_over(database_url, client)
    # Where it is, life goes on.
    async with socket_to(other, user) as socket:
        frames = await socket.answer(script_of(("text", "fine")), unreadable[0].conversation_id)
    assert text_of(frames) == frames[-1]["message"]["content"] == "fine"


async def assert_is_over(database_url: str, client: Client) -> None:
    """Assert that the turn failed once, under its second epoch, and that the database holds what its client shows."""
    conversation_id = uuid.UUID(client.conversation_id)
    (turn,) = await sql(database_url, "SELECT status, epoch FROM turns WHERE conversation_id = $1", conversation_id)
    assert tuple(turn) == ("failed", 2)
    events = await sql(
        database_url, "SELECT seq, type FROM events WHERE conversation_id = $1 ORDER BY seq", conversation_id
    )
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert [event["type"] for event in events if event["type"] in TERMINAL] == ["turn.failed"]
    messages = await sql(
        database_url,
        "SELECT role, content, status FROM messages WHERE conversation_id = $1 ORDER BY position",
        conversation_id,
    )
    assert [tuple(message) for message in messages[1:]] == [("assistant", client.text, "failed")]
