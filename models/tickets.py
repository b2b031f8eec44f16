"""Tickets: what a client that can set nothing but a URL connects with, once and soon, on any node."""

from __future__ import annotations

from anynode.models.database import Database


async def add_ticket(
    database: Database, hash: str, user_id: str, *, token_expires_at: float, lasts_seconds: float, tickets_max: int
) -> float | None:
    """Keep the hash of a ticket for the user of a token that expires then (Unix seconds). Returns when the ticket
    expires. None: the user has as many as there may be. Raises Unavailable."""
    rows = await database.fetch("add_ticket", hash, user_id, token_expires_at, lasts_seconds, tickets_max)
    return rows[0]["expires_at"] if rows else None


async def redeem_ticket(database: Database, hash: str) -> tuple[str, float] | None:
    """Take a ticket: its user, and when the token expires that it was had for. None: there is none, or no longer.
    Raises Unavailable."""
    rows = await database.fetch("redeem_ticket", hash)
    if not rows or not rows[0]["is_fresh"]:
        return None
    return rows[0]["user_id"], rows[0]["token_expires_at"]


async def delete_expired_tickets(database: Database) -> None:
    """Forget those that nobody came with. Raises Unavailable."""
    await database.fetch("delete_expired_tickets")
