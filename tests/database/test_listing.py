"""A page of the list costs a bounded time and has a bounded size, and going on finds every conversation once."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest

from anynode.models import listing as module
from anynode.models.database import Database
from anynode.models.listing import ConversationPage, Place, list_conversations
from tests.kit.harness import sql

NEWEST = datetime(2026, 1, 31, tzinfo=UTC)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    await sql(database_url, "INSERT INTO users (id) VALUES ('ada')")
    database = await Database.connect(database_url, pool_max=1)
    yield database
    await database.close()


async def fill(database_url: str, *titles: str, prompt_bytes: int = 0) -> None:
    """Conversations of Ada's with these titles, the newest first."""
    statement = """INSERT INTO conversations (id, user_id, title, system_prompt, updated_at)
        VALUES ($1, 'ada', $2, repeat('x', $3), $4)"""
    for number, title in enumerate(titles):
        await sql(database_url, statement, uuid.UUID(int=number), title, prompt_bytes, NEWEST - timedelta(days=number))


def titles(page: ConversationPage) -> list[str]:
    return [row["title"] for row in page.rows]


async def pages(database: Database, *, limit: int, search: str | None = None) -> list[list[str]]:
    """The titles of all pages."""
    found: list[list[str]] = []
    place: Place | None = None
    while not found or place is not None:
        page = await list_conversations(database, "ada", limit=limit, before=place, search=search)
        found.append(titles(page))
        place = page.next_place
    return found


@pytest.mark.parametrize("limit", [1, 2, 9])
async def test_a_search_looks_at_a_bounded_number_of_titles_and_says_where_to_go_on(
    database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(module, "SEARCHED_MAX", 4)
    await fill(database_url, "b", "b", "a1", "b", "a2", "b", "b", "b", "b", "b", "b", "a3", "b")
    found = await pages(database, limit=limit, search="A")
    assert [title for page in found for title in page] == ["a1", "a2", "a3"]
    assert all(len(page) <= limit for page in found)
    assert len(found) <= 4 + 3  # thirteen titles in fours, and once more where a page was full
    assert await pages(database, limit=limit) == [
        ["b", "b", "a1", "b", "a2", "b", "b", "b", "b", "b", "b", "a3", "b"][start : start + limit]
        for start in range(0, 13, limit)
    ]


async def test_a_search_says_whether_it_has_looked_at_all(
    database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SEARCHED_MAX", 3)
    await fill(database_url, "b", "b", "b", "a")
    first = await list_conversations(database, "ada", limit=5, search="a")
    assert (titles(first), first.is_searched_to_its_end) == ([], False)
    assert first.next_place == (NEWEST - timedelta(days=2), uuid.UUID(int=2))
    second = await list_conversations(database, "ada", limit=5, search="a", before=first.next_place)
    assert (titles(second), second.is_searched_to_its_end, second.next_place) == (["a"], True, None)


async def test_a_page_ends_with_the_conversation_that_fills_2_mib(database: Database, database_url: str) -> None:
    await fill(database_url, *"abcdefg", prompt_bytes=2**20 - 2)
    assert await pages(database, limit=100) == [["a", "b"], ["c", "d"], ["e", "f"], ["g"]]
    page = await list_conversations(database, "ada", limit=100, skip=1)
    assert titles(page) == ["b", "c"]
