"""What users spend and store is counted exactly, whatever runs at the same instant, and nothing waits in a circle."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest

from anynode.models.admissions import Admission, Question, admit, regenerate
from anynode.models.conversations import (
    create_conversation,
    delete_conversation,
    get_or_create_conversation,
    update_conversation,
)
from anynode.models.database import Database
from anynode.models.events import Ending, Entry, Event, NewMessage, flush
from anynode.models.ids import uuid7
from anynode.models.messages import AppendedMessage, append_messages
from anynode.models.usage import OverQuota, measure_stored
from tests.kit.harness import sql

LIMITS: dict[str, int] = {
    "turns_per_user_max": 1000,
    "turns_per_user_per_minute": 100_000,
    "tokens_per_user_per_day": 1_000_000,
    "conversations_per_user_max": 1000,
    "messages_per_user_bytes_max": 10_000_000,
}
USERS = ("ada", "bob")
TERMS: dict[str, Any] = {"node": "n", "lease_seconds": 60.0, "history_messages_max": 10, "on_sent": lambda: None}


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    database = await Database.connect(database_url, pool_max=12)
    yield database
    await database.close()


def with_limits(**limits: int) -> str:
    return json.dumps({**LIMITS, **limits})


def question(user_id: str, conversation_id: UUID | None = None, *, chat: str | None = None) -> Question:
    return Question(
        user_id=user_id,
        conversation_id=conversation_id,
        new_conversation_id=uuid7(),
        title="title",
        message_id=uuid7(),
        client_message_id=str(uuid7()),
        content="question",
        created_at=datetime.now(UTC),
        turn_id=uuid7(),
        message_created='{"message": {}}',
        turn_started='{"message_id": "m"}',
        client_chat_id=chat,
    )


async def ask(database: Database, asked: Question, **limits: int) -> Admission:
    return await admit(database, asked, limits=with_limits(**limits), **TERMS)


def entry_of(admission: Admission, user_id: str, *, tokens: int) -> Entry:
    """The end of a turn that has just begun."""
    assert admission.turn_id is not None
    assert admission.first_seq is not None
    end = Event(admission.first_seq + 2, "turn.completed", str(admission.turn_id), "{}")
    answer = NewMessage(
        id=uuid7(),
        user_id=user_id,
        number=1,
        role="assistant",
        content="answer",
        tool_calls=None,
        tool_name=None,
        tool_call_id=None,
        status="completed",
        created_at=datetime.now(UTC),
    )
    return Entry(admission.turn_id, 1, [end], Ending("completed", [answer], tokens=tokens))


async def usage(url: str, user_id: str = "ada") -> dict[str, Any]:
    (row,) = await sql(url, "SELECT * FROM user_usage WHERE user_id = $1", user_id)
    return dict(row)


async def test_a_statement_that_is_repeated_after_its_answer_was_lost_is_admitted_at_the_limit_and_counts_once(
    database: Database, database_url: str
) -> None:
    asked = question("ada")
    for _ in range(3):
        assert (await ask(database, asked, turns_per_user_max=1, turns_per_user_per_minute=1)).outcome == "admitted"
    counted = await usage(database_url)
    assert (counted["minute_turns"], counted["running"]) == (1, [asked.turn_id])


async def test_a_refused_question_leaves_nothing_behind(database: Database, database_url: str) -> None:
    admitted = await ask(database, question("ada"), turns_per_user_max=1)
    for refused in (question("ada"), question("ada", chat="chat-1")):
        outcome = await ask(database, refused, turns_per_user_max=1)
        assert outcome.outcome == "rate_limited"
        assert outcome.reached is not None
        assert outcome.reached.name == "turns_per_user_max"
    ((conversations, messages),) = await sql(
        database_url, "SELECT (SELECT count(*) FROM conversations), (SELECT count(*) FROM messages)"
    )
    assert (conversations, messages) == (1, 1)
    assert (await usage(database_url))["running"] == [admitted.turn_id]


async def test_without_limits_nothing_is_counted(database: Database, database_url: str) -> None:
    admission = await admit(database, question("ada"), **TERMS)
    await flush(database, [entry_of(admission, "ada", tokens=5)], within_seconds=5)
    assert await sql(database_url, "SELECT FROM user_usage") == []


async def test_a_flush_that_is_repeated_settles_once(database: Database, database_url: str) -> None:
    ended = entry_of(await ask(database, question("ada")), "ada", tokens=7)
    for _ in range(2):
        await flush(database, [ended], within_seconds=5)
    counted = await usage(database_url)
    assert (counted["day_tokens"], counted["bytes"]) == (7, len("question{}answer"))


async def test_what_is_measured_while_more_is_stored_is_right_in_the_end(database: Database, database_url: str) -> None:
    await asyncio.gather(*(ask(database, question("ada")) for _ in range(20)))
    await sql(database_url, "UPDATE user_usage SET bytes = 999, conversations = 99")  # of others, deleted since

    async def measure() -> None:
        await sql(database_url, "UPDATE user_usage SET measured_at = '-infinity'")
        assert await measure_stored(database, "ada")

    await asyncio.gather(*(ask(database, question("ada")) for _ in range(20)), measure())
    counted = await usage(database_url)
    assert (counted["conversations"], counted["bytes"]) == (40, 40 * len("question{}"))


async def test_one_caller_in_a_minute_measures(database: Database, database_url: str) -> None:
    await ask(database, question("ada"))
    assert sorted(await asyncio.gather(*(measure_stored(database, "ada") for _ in range(6)))) == [False] * 5 + [True]
    assert not await measure_stored(database, "bob")  # nothing was counted


async def test_nothing_waits_in_a_circle(database: Database, database_url: str) -> None:
    """Two users do everything that locks their rows and their conversations, all at once."""
    randomly = random.Random(7)
    ids = {user: [uuid7() for _ in range(4)] for user in USERS}
    running: list[tuple[Admission, str]] = []

    async def act() -> None:
        user = randomly.choice(USERS)
        conversation_id = randomly.choice(ids[user])
        match randomly.randrange(8):
            case 0 | 1:
                admission = await ask(database, question(user, randomly.choice([conversation_id, None])))
                if admission.outcome == "admitted":
                    running.append((admission, user))
            case 2:
                admission = await ask(database, question(user, chat=f"chat-{randomly.randrange(3)}"))
                if admission.outcome == "admitted":
                    running.append((admission, user))
            case 3 if running:
                ended = [running.pop() for _ in range(min(len(running), 5))]
                entries = [entry_of(admission, user, tokens=1) for admission, user in ended]
                await flush(database, entries, within_seconds=5)
            case 4:
                await update_conversation(database, user, conversation_id, {"title": "t"}, limits=with_limits())
            case 5:
                terms = {**TERMS, "turn_id": uuid7(), "created_at": datetime.now(UTC), "limits": with_limits()}
                admission = await regenerate(database, user, conversation_id, None, **terms)
                if admission.outcome == "admitted":
                    await sql(
                        database_url,
                        "UPDATE turns SET status = 'failed', finished_at = now() WHERE id = $1",
                        admission.turn_id,
                    )
            case 6:
                await append(user, conversation_id)
            case 7:
                await get_or_create_conversation(
                    database,
                    user,
                    conversation_id=uuid7(),
                    client_id=f"chat-{randomly.randrange(3)}",
                    wanted_id=None,
                    title=None,
                    system_prompt=None,
                    metadata="{}",
                    created_at=datetime.now(UTC),
                    limits=with_limits(),
                )
            case _:
                await delete_conversation(database, user, conversation_id, is_forced=True)
                await create(user, conversation_id)

    async def append(user: str, conversation_id: UUID) -> None:
        message = AppendedMessage(
            id=uuid7(), role="assistant", content="a", tool_calls=None, tool_name=None, tool_call_id=None, payload="{}"
        )
        await append_messages(
            database,
            user,
            conversation_id,
            created_at=datetime.now(UTC),
            checked=lambda _: [(message, None)],
            limits=with_limits(),
        )

    async def create(user: str, conversation_id: UUID) -> None:
        await create_conversation(
            database,
            user,
            conversation_id,
            title=None,
            system_prompt=None,
            metadata="{}",
            created_at=datetime.now(UTC),
            limits=with_limits(),
        )

    for user in USERS:
        await asyncio.gather(*(create(user, conversation_id) for conversation_id in ids[user]))

    async def act_often() -> None:
        for _ in range(40):
            await act()

    await asyncio.gather(*(act_often() for _ in range(12)))
    ((deadlocks,),) = await sql(
        database_url, "SELECT pg_stat_get_db_deadlocks(oid) FROM pg_database WHERE datname = current_database()"
    )
    assert deadlocks == 0
    for user in USERS:
        await sql(database_url, "UPDATE user_usage SET measured_at = '-infinity' WHERE user_id = $1", user)
        added_up = await usage(database_url, user)
        assert await measure_stored(database, user)
        measured = await usage(database_url, user)
        assert measured["bytes"] <= added_up["bytes"]
        assert measured["conversations"] <= added_up["conversations"]


async def test_a_user_over_the_quota_by_what_was_deleted_is_measured_and_stores_again(
    database: Database, database_url: str
) -> None:
    first = uuid7()
    limits = with_limits(conversations_per_user_max=1)

    async def create(id: UUID) -> None:
        await create_conversation(
            database,
            "ada",
            id,
            title=None,
            system_prompt=None,
            metadata="{}",
            created_at=datetime.now(UTC),
            limits=limits,
        )

    await create(first)
    with pytest.raises(OverQuota):
        await create(uuid7())
    await delete_conversation(database, "ada", first, is_forced=False)
    await sql(database_url, "UPDATE user_usage SET measured_at = '-infinity'")
    await create(uuid7())
