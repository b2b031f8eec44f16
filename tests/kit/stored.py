"""What the database holds of a conversation, read behind the server's back."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Sequence

import asyncpg

from tests.kit.exactness import roles_after
from tests.kit.harness import Frame, sql, text_of
from tests.kit.transcripts import assert_all_was_shown


async def messages_of(database_url: str, conversation_id: str) -> Sequence[asyncpg.Record]:
    """The conversation's messages; their roles are in order, and their positions without a gap."""
    messages = await sql(
        database_url,
        "SELECT position, role, content, status, turn_id::text FROM messages WHERE conversation_id = $1 "
        "ORDER BY position",
        uuid.UUID(conversation_id),
    )
    assert [message["position"] for message in messages] == list(range(1, len(messages) + 1))
    before = None
    for message in messages:
        # An answer that is superseded is followed by another one.
        if before is None or before["status"] != "superseded" or before["turn_id"] == message["turn_id"]:
            assert message["role"] in roles_after(before["role"] if before else None)
        before = message
    return messages


async def turns_of(database_url: str, conversation_id: str) -> list[str]:
    """The states of the conversation's turns, in their order."""
    rows = await sql(
        database_url,
        "SELECT status FROM turns WHERE conversation_id = $1 ORDER BY first_seq",
        uuid.UUID(conversation_id),
    )
    return [row["status"] for row in rows]


async def said_in(database_url: str, conversation_id: str) -> str:
    """The answers of a conversation as the database has them."""
    rows = await sql(
        database_url,
        "SELECT string_agg(content, '' ORDER BY position) AS said FROM messages "
        "WHERE conversation_id = $1 AND role = 'assistant'",
        uuid.UUID(conversation_id),
    )
    return str(rows[0]["said"])


async def assert_seqs_are_gapless(database_url: str, conversation_id: str) -> None:
    """The journal holds every seq from 1 up to the conversation's last one."""
    rows = await sql(
        database_url,
        "SELECT array_agg(e.seq ORDER BY e.seq) AS seqs, c.last_seq FROM conversations c "
        "JOIN events e ON e.conversation_id = c.id WHERE c.id = $1 GROUP BY c.id",
        uuid.UUID(conversation_id),
    )
    assert rows[0]["seqs"] == list(range(1, rows[0]["last_seq"] + 1))


def ended(database_url: str, conversation_id: str) -> Callable[[], Awaitable[object]]:
    """Whether no turn of the conversation is running any more."""

    async def condition() -> bool:
        statement = "SELECT bool_and(status <> 'running') AS is_over FROM turns WHERE conversation_id = $1"
        return bool((await sql(database_url, statement, uuid.UUID(conversation_id)))[0]["is_over"])

    return condition


async def assert_cancelled(database_url: str, *transcripts: Sequence[Frame]) -> str:
    """All have seen the whole turn, which was cancelled; they show what its message holds. Returns that."""
    texts = set()
    for frames in transcripts:
        assert frames[-1]["type"] == "turn.cancelled"
        assert frames[-1]["message"]["status"] == "cancelled"
        assert text_of(frames) == frames[-1]["message"]["content"]
        await assert_all_was_shown(database_url, frames)
        texts.add(text_of(frames))
    (text,) = texts
    conversation_id = transcripts[0][0]["conversation_id"]
    messages = await messages_of(database_url, conversation_id)
    last = messages[-1]
    assert (last["role"], last["content"], last["status"]) == ("assistant", text, "cancelled")
    assert await turns_of(database_url, conversation_id) == ["cancelled"]
    return text
