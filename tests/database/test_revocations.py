"""The statements about revocations: what is written, what a watch hears, what is forgotten, what is left of a user."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator, Mapping
from functools import partial

import pytest

from anynode.models import revocations as module
from anynode.models.database import Database
from anynode.models.revocations import (
    ALL_USERS,
    forget_revocations,
    load_revocations,
    read_revocations,
    revoke,
    stop_turns,
    user_hash,
)
from anynode.models.tickets import Redeemed, add_ticket, redeem_ticket
from anynode.models.turns import watch
from tests.kit.harness import sql

ADA = hashlib.sha256("Ada \N{SNOWMAN}".encode()).hexdigest()
LIMITS = '{"turns": 1}'


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    opened = await Database.connect(database_url, pool_max=4)
    yield opened
    await opened.close()


async def all_of(database: Database) -> Mapping[str, float]:
    found: dict[str, float] = {}
    async for page in read_revocations(database.run):
        found |= page
    return found


async def heard(database: Database, since: int | None) -> tuple[Mapping[str, float], int]:
    news = await watch(database, node="n", since=since, limit=100, within_seconds=5.0)
    return news.revoked, news.horizon


async def test_a_revocation_has_the_databases_time_and_no_name(database: Database, database_url: str) -> None:
    before = time.time()
    at = await revoke(database, "Ada \N{SNOWMAN}")
    assert before - 1 < at < time.time() + 1
    assert await all_of(database) == {ADA: at}
    later = await revoke(database, "Ada \N{SNOWMAN}")
    of_all = await revoke(database, None)
    assert await all_of(database) == {ADA: later, ALL_USERS: of_all}
    assert at < later < of_all
    (row,) = await sql(database_url, "SELECT string_agg(r::text, '') AS text FROM revocations r")
    assert "Ada" not in row["text"]


async def test_a_watch_hears_of_a_revocation_and_of_its_repetition(database: Database) -> None:
    first, horizon = await heard(database, None)
    assert first == {}  # what was there before is read apart
    at = await revoke(database, "Ada \N{SNOWMAN}")
    news, horizon = await heard(database, horizon)
    assert news == {ADA: at}
    # Transactions of other databases may hold the horizon up; until they have ended it is heard once more.
    again, horizon = await heard(database, horizon)
    assert again in ({}, {ADA: at})
    later = await revoke(database, "Ada \N{SNOWMAN}")
    assert (await heard(database, horizon))[0] == {ADA: later}


async def test_all_revocations_are_read_in_pages(
    database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAGE_ROWS", 3)
    await sql(database_url, "INSERT INTO revocations SELECT md5(n::text), n FROM generate_series(1, 9) n")
    expected = {hashlib.md5(str(n).encode()).hexdigest(): float(n) for n in range(1, 10)}
    assert await all_of(database) == expected
    loaded: list[Mapping[str, float]] = []
    await load_revocations(database_url, loaded.append)
    assert [len(page) for page in loaded] == [3, 3, 3, 0]
    assert {hash: at for page in loaded for hash, at in page.items()} == expected


async def test_a_year_later_a_revocation_of_one_user_is_forgotten(database: Database, database_url: str) -> None:
    old = time.time() - 1000
    await sql(database_url, "INSERT INTO revocations VALUES ('*', $1), ('old', $1), ('new', $1 + 900)", old)
    await forget_revocations(database, after_seconds=500.0)
    assert (await all_of(database)).keys() == {"*", "new"}


@pytest.mark.parametrize("statement", ["DELETE FROM users WHERE id = $1", "DELETE FROM users WHERE $1 <> ''"])
async def test_a_user_who_is_deleted_by_hand_leaves_a_revocation(
    database: Database, database_url: str, statement: str
) -> None:
    await sql(database_url, "INSERT INTO users (id) VALUES ('Ada \N{SNOWMAN}')")
    at = await revoke(database, "Ada \N{SNOWMAN}")
    await sql(database_url, statement, "Ada \N{SNOWMAN}")
    (hash,) = found = await all_of(database)
    assert hash == user_hash("Ada \N{SNOWMAN}") == ADA
    assert at < found[hash] < time.time() + 1


async def test_running_turns_of_one_user_or_of_all_are_asked_to_stop_once(
    database: Database, database_url: str
) -> None:
    await sql(database_url, "INSERT INTO users (id) VALUES ('ada'), ('bob')")
    await sql(
        database_url,
        "INSERT INTO conversations (id, user_id) SELECT md5(n::text)::uuid, (ARRAY['ada', 'bob'])[1 + n % 2]"
        " FROM generate_series(1, 5) n",
    )
    await sql(
        database_url,
        "INSERT INTO turns (id, conversation_id, status, node, epoch, lease_expires_at)"
        " SELECT gen_random_uuid(), id, 'running', 'n', 1, now() FROM conversations",
    )
    stopped = [await stop_turns(database, user) for user in ("eve", "ada", "ada", None, None)]
    assert stopped == [0, 2, 0, 3, 0]


# Tickets.


async def ticket(database: Database, *, expires_in: float = 60.0, issued_at: float | None = None) -> None:
    await add_ticket(
        database,
        "ticket",
        "Ada \N{SNOWMAN}",
        token_expires_at=time.time() + expires_in,
        issued_at=time.time() if issued_at is None else issued_at,
        limits=LIMITS,
        lasts_seconds=30.0,
        tickets_max=100,
    )


redeem = partial(redeem_ticket, hash="ticket")


async def test_a_ticket_has_the_times_and_the_limits_of_its_token(database: Database) -> None:
    await ticket(database, issued_at=7.5)
    redeemed = await redeem(database)
    assert redeemed is not None
    assert redeemed == Redeemed("Ada \N{SNOWMAN}", redeemed.token_expires_at, 7.5, LIMITS)
    assert await redeem(database) is None


async def test_a_ticket_is_worth_nothing_after_its_tokens_end(database: Database, database_url: str) -> None:
    await ticket(database, expires_in=-0.001)
    assert await redeem(database) is None
    assert await sql(database_url, "SELECT FROM tickets") == []


@pytest.mark.parametrize("user", ["Ada \N{SNOWMAN}", None])
async def test_a_ticket_is_worth_nothing_after_a_revocation_of_its_token(database: Database, user: str | None) -> None:
    await ticket(database)
    await revoke(database, user)
    assert await redeem(database) is None
    await revoke(database, "somebody else")
    await ticket(database, issued_at=time.time() + 1)
    assert await redeem(database) is not None


@pytest.mark.parametrize("is_revoked", [False, True])
async def test_a_ticket_of_an_older_node_is_good_unless_its_user_was_revoked_before(
    database: Database, database_url: str, is_revoked: bool
) -> None:
    if is_revoked:
        await revoke(database, "Ada \N{SNOWMAN}")
    statement = (
        "INSERT INTO tickets (hash, user_id, token_expires_at, expires_at) VALUES ('ticket', $1, 4e9, 'infinity')"
    )
    await sql(database_url, statement, "Ada \N{SNOWMAN}")
    expected = None if is_revoked else Redeemed("Ada \N{SNOWMAN}", 4e9, 0.0, None)
    assert await redeem(database) == expected
