"""Revocations: from when on the tokens of a user, or of all users, must have been issued.

A row has the hash of the user's id: it outlives the user, of whom nothing else is left.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Final

import asyncpg

from anynode.models.database import Database
from anynode.models.database_url import normalise_url
from anynode.models.queries import Bound, bind
from anynode.models.schema_version import OPTIONS

ALL_USERS: Final = "*"  # in the place of a hash
PAGE_ROWS: Final = 10_000
Fetch = Callable[[Bound], Awaitable[Sequence[asyncpg.Record]]]


def user_hash(user_id: str) -> str:
    """Return what stands for a user in `revocations`: SHA-256 of the id in UTF-8, in hexadecimal."""
    return hashlib.sha256(user_id.encode()).hexdigest()


async def revoke(database: Database, user_id: str | None) -> float:
    """Refuse the tokens of a user (None: of all users) that were issued before now, on every node.

    Returns the time of the revocation, in Unix seconds of the database's clock. Raises Unavailable.
    """
    hash = ALL_USERS if user_id is None else user_hash(user_id)
    (row,) = await database.run(bind("revoke", user_hash=hash))
    not_before: float = row["not_before"]
    return not_before


async def stop_turns(database: Database, user_id: str | None) -> int:
    """Ask all running turns of a user (None: of all users) to stop. Returns how many had not been asked before.

    Raises Unavailable.
    """
    return len(await database.run(bind("stop_turns", user_id=user_id)))


async def read_revocations(fetch: Fetch) -> AsyncIterator[Mapping[str, float]]:
    """Yield all revocations (hash of the user's id → not before), in pages."""
    after = ""
    while True:
        rows = await fetch(bind("read_revocations", after=after, rows_max=PAGE_ROWS))
        yield {row["user_hash"]: row["not_before"] for row in rows}
        if len(rows) < PAGE_ROWS:
            return
        after = rows[-1]["user_hash"]


async def load_revocations(url: str, hear: Callable[[Mapping[str, float]], object]) -> None:
    """Read all revocations over a connection of their own, before a node's first statement. Raises asyncpg's errors."""
    connection = await asyncpg.connect(normalise_url(url), **OPTIONS)

    async def fetch(statement: Bound) -> Sequence[asyncpg.Record]:
        rows: list[asyncpg.Record] = await connection.fetch(statement.sql, *statement.arguments)
        return rows

    try:
        async for page in read_revocations(fetch):
            hear(page)
    finally:
        await connection.close(timeout=5)


async def forget_revocations(database: Database, *, after_seconds: float) -> None:
    """Forget the revocations of single users from more than `after_seconds` ago. Raises Unavailable."""
    await database.run(bind("forget_revocations", after_seconds=after_seconds))
