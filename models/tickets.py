"""Tickets: a client that can set nothing but a URL connects with one, once and soon, to any node."""

from __future__ import annotations

from dataclasses import dataclass

from anynode.models.database import Database
from anynode.models.queries import bind


@dataclass(frozen=True, slots=True)
class Redeemed:
    """What a ticket stands for: its user, and when the user's token expires and was issued (Unix seconds).

    `limits` is JSON. It is None, and `issued_at` is 0, where a node of an older release has issued the ticket.
    """

    user_id: str
    token_expires_at: float
    issued_at: float
    limits: str | None


async def add_ticket(
    database: Database,
    hash: str,
    user_id: str,
    *,
    token_expires_at: float,
    issued_at: float,
    limits: str,
    lasts_seconds: float,
    tickets_max: int,
) -> float | None:
    """Keep the hash of a ticket for the user of a token, which expires and was issued at these times (Unix seconds) and
    has these limits (JSON).

    Returns when the ticket expires (Unix seconds). None: the user has `tickets_max` unused ones. Raises Unavailable.
    """
    added = bind(
        "add_ticket",
        hash=hash,
        user_id=user_id,
        token_expires_at=token_expires_at,
        issued_at=issued_at,
        limits=limits,
        lasts_seconds=lasts_seconds,
        tickets_max=tickets_max,
    )
    rows = await database.run(added)
    return rows[0]["expires_at"] if rows else None


async def redeem_ticket(database: Database, hash: str) -> Redeemed | None:
    """Take a ticket. None: there is no such ticket, or it or its token has expired, or the token was revoked. Raises
    Unavailable."""
    rows = await database.run(bind("redeem_ticket", hash=hash))
    if not rows or not rows[0]["is_fresh"] or rows[0]["is_revoked"]:
        return None
    row = rows[0]
    return Redeemed(row["user_id"], row["token_expires_at"], row["issued_at"] or 0.0, row["limits"])


async def delete_expired_tickets(database: Database) -> None:
    """Delete the tickets that nobody used in time. Raises Unavailable."""
    await database.run(bind("delete_expired_tickets"))
