"""Tickets: a client that can set nothing but a URL connects with one, once and soon, to any node."""

from __future__ import annotations

from anynode.models.database import Database
from anynode.models.queries import bind


async def add_ticket(
    database: Database, hash: str, user_id: str, *, token_expires_at: float, lasts_seconds: float, tickets_max: int
) -> float | None:
    """Keep the hash of a ticket for the user of a token that expires at `token_expires_at` (Unix seconds).

    Returns when the ticket expires (Unix seconds). None: the user has `tickets_max` unused ones. Raises Unavailable.
    """
    added = bind(
        "add_ticket",
        hash=hash,
        user_id=user_id,
        token_expires_at=token_expires_at,
        lasts_seconds=lasts_seconds,
        tickets_max=tickets_max,
    )
    rows = await database.run(added)
    return rows[0]["expires_at"] if rows else None


async def redeem_ticket(database: Database, hash: str) -> tuple[str, float] | None:
    """Take a ticket. Returns its user, and when the token expires that it was exchanged for (Unix seconds).

    None: there is no such ticket, or it has expired. Raises Unavailable.
    """
    rows = await database.run(bind("redeem_ticket", hash=hash))
    if not rows or not rows[0]["is_fresh"]:
        return None
    return rows[0]["user_id"], rows[0]["token_expires_at"]


async def delete_expired_tickets(database: Database) -> None:
    """Delete the tickets that nobody used in time. Raises Unavailable."""
    await database.run(bind("delete_expired_tickets"))
