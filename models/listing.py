"""The list of a user's conversations, and the search in their titles: pages of bounded cost and size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, TypeAlias
from uuid import UUID

import asyncpg

from anynode.models.database import READ_BYTES_MAX, Database
from anynode.models.queries import bind

SEARCHED_MAX: Final = 5000  # titles that one page of a search looks at; it takes some milliseconds

Place: TypeAlias = tuple[datetime, UUID]  # in the list: when a conversation was last active, and its id


@dataclass(frozen=True, slots=True)
class ConversationPage:
    """A page of the list, newest activity first. `next_place` is where the next page begins, None at the end: behind
    the last of `rows`, or (`is_searched_to_its_end` is false) behind the last title that the search has looked at."""

    rows: Sequence[asyncpg.Record]
    next_place: Place | None
    is_searched_to_its_end: bool = True


async def list_conversations(
    database: Database,
    user_id: str,
    *,
    limit: int,
    skip: int = 0,
    before: Place | None = None,
    search: str | None = None,
) -> ConversationPage:
    """Return at most `limit` conversations, and about 2 MiB, newest activity first, from the top or from a place on.

    The first `skip` are left out. With `search`, only those are listed whose titles contain it, in upper or lower case,
    of the newest 5,000 (`SEARCHED_MAX`) behind the place. Raises Unavailable.
    """
    arguments = {
        "user_id": user_id,
        "conversations_max": limit + 1,  # one more shows that there are more
        "skip": skip,
        "search": search,
        "looked_at_max": skip + limit + 1 if search is None else SEARCHED_MAX,
        "bytes_max": READ_BYTES_MAX,
    }
    if before is None:
        found = await database.run(bind("list_conversations", **arguments))
    else:
        updated_at, id = before
        place = bind("list_conversations_before", before_updated_at=updated_at, before_id=id, **arguments)
        found = await database.run(place)
    rows = [row for row in found if row["is_listed"]]
    listed = rows[:limit]
    if listed and (len(rows) > limit or rows[-1]["bytes"] >= READ_BYTES_MAX):
        return ConversationPage(listed, _place(listed[-1]))
    if len(rows) < len(found):
        return ConversationPage(listed, _place(found[-1]), is_searched_to_its_end=False)
    return ConversationPage(listed, None)


def _place(row: asyncpg.Record) -> Place:
    return row["updated_at"], row["id"]
