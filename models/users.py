"""Users: the e-mail addresses that their tokens tell, and the end of a user whose conversations are gone."""

from __future__ import annotations

from collections.abc import Mapping

import asyncpg

from anynode.models.database import Database
from anynode.models.queries import bind


async def write_emails(
    database: Database, emails: Mapping[str, str], *, issued_at: Mapping[str, float], within_seconds: float
) -> None:
    """Store e-mail addresses by their users' ids; users who are new are made. An address is left out where the token
    that told it, issued at that time (Unix seconds), was revoked. Raises Unavailable."""
    written = bind(
        "write_emails",
        user_ids=list(emails),
        emails=list(emails.values()),
        issued_ats=[issued_at[user_id] for user_id in emails],
    )
    await database.run(written, within_seconds=within_seconds)


async def delete_user(database: Database, user_id: str) -> tuple[bool, int]:
    """Delete a user without conversations, and the user's tickets.

    Returns whether nothing is stored of the user any more, and how many tickets were deleted. False: there are
    conversations. Raises Unavailable.
    """
    try:
        (row,) = await database.run(bind("delete_user", user_id=user_id))
    except asyncpg.ForeignKeyViolationError:  # a conversation was made while the statement ran
        return False, 0
    return not row["has_conversations"], row["tickets"]
