"""Reading a long conversation takes the memory of one page, however many messages there are and however large."""

from __future__ import annotations

import asyncio
import json
import sys
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest

from anynode import Store
from anynode.server.store.rows import PAGE_BYTES, PAGE_MESSAGES
from tests.kit.harness import sql

TOP: Final = Path(__file__).parents[2]
MIB_MAX: Final = 50.0
FILL: Final = """
INSERT INTO messages (id, conversation_id, user_id, position, role, content, created_at)
SELECT gen_random_uuid(), $1, $2, n, CASE n % 2 WHEN 1 THEN 'user' ELSE 'assistant' END,
       repeat('x', CASE WHEN $4 > 0 AND n % $4 = 0 THEN 1048576 ELSE 100 END), now()
FROM generate_series(1, $3) n
"""


@pytest.fixture
async def store(module_database_url: str) -> AsyncIterator[Store]:
    async with Store(module_database_url) as store:
        yield store


async def filled(store: Store, user: str, count: int, *, large_each: int = 0) -> uuid.UUID:
    """A conversation with `count` messages, of which each `large_each`th has 1 MiB."""
    made = await store.create_conversation(user)
    await sql(store._url, FILL, made.id, user, count, large_each)
    return made.id


@pytest.mark.slow
@pytest.mark.parametrize(("count", "large_each"), [(100_000, 0), (4_000, 100), (60, 1)])
async def test_a_long_conversation_is_read_within_a_pages_memory(
    store: Store, user: str, count: int, large_each: int
) -> None:
    few, many = await filled(store, user, 2), await filled(store, user, count, large_each=large_each)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.kit.measured_reading", store._url, str(few), str(many), user),
        cwd=TOP,
        stdout=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        said, _ = await process.communicate()
    assert process.returncode == 0
    measured: dict[str, Any] = json.loads(said)
    large = count // large_each if large_each else 0
    assert measured["count"] == count
    assert measured["bytes"] == (count - large) * 100 + large * 1_048_576
    assert measured["mib"] < MIB_MAX, measured


async def test_a_page_is_bounded_by_messages_and_by_bytes(store: Store, user: str) -> None:
    small, mixed, large = [
        await filled(store, user, count, large_each=each) for count, each in ((PAGE_MESSAGES * 2, 0), (40, 3), (4, 1))
    ]

    async def pages(id: uuid.UUID) -> list[int]:
        position, sizes = 0, []
        while page := await store._parts.rows.page(user, id, position):
            assert [message.position for message in page] == list(range(position + 1, position + 1 + len(page)))
            assert len(page) == 1 or sum(len(message.content) for message in page) <= PAGE_BYTES
            position = page[-1].position
            sizes.append(len(page))
        return sizes

    assert await pages(small) == [PAGE_MESSAGES, PAGE_MESSAGES]
    assert sum(await pages(mixed)) == 40
    assert await pages(large) == [2, 2]


async def test_a_message_that_is_larger_than_a_page_comes_alone(store: Store, user: str) -> None:
    made = await filled(store, user, 3)
    await sql(
        store._url,
        "UPDATE messages SET content = repeat('x', 5000000) WHERE conversation_id = $1 AND position = 2",
        made,
    )
    assert [len(message.content) async for message in store.get_messages(made, user)] == [100, 5_000_000, 100]
    assert [len(await store._parts.rows.page(user, made, position)) for position in (0, 1, 2, 3)] == [1, 1, 1, 0]


async def test_messages_that_are_appended_while_others_are_read_come_at_the_end(store: Store, user: str) -> None:
    made = await filled(store, user, PAGE_MESSAGES)
    seen = []
    async for message in store.get_messages(made, user):
        seen.append(message.position)
        if message.position in (1, PAGE_MESSAGES):
            await store.save_conversation_messages(
                made, user, [{"role": "user", "content": "more"}, {"role": "assistant", "content": "and more"}]
            )
    assert seen == list(range(1, PAGE_MESSAGES + 5))
