"""Tickets for clients that can set nothing but a URL: each admits one connection, within 30 seconds, on any node.

Proxies and servers write URLs to their logs, so a long-lived token does not belong into one. A ticket is used up by
the time that anybody reads the log.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Final

import msgspec

from anynode.models.database import Database
from anynode.models.tickets import add_ticket, redeem_ticket
from anynode.server.auth import Identity
from anynode.server.engine.postgres_errors import unavailable_as_client_error
from anynode.server.errors import RateLimited, Unauthorized
from anynode.server.limits import UserLimits
from anynode.server.protocol.encoding import encode

TICKET_SECONDS: Final = 30.0
TICKETS_MAX: Final = 100  # of one user at once


class Tickets:
    """Issues and redeems tickets; the database holds their hashes."""

    def __init__(self, database: Database, limits: UserLimits) -> None:
        self._database = database
        self._limits = limits  # of a ticket that does not say its own

    async def issue(self, identity: Identity) -> tuple[str, float]:
        """Return a new ticket, and when it expires (Unix seconds). Raises RateLimited or DatabaseUnavailable."""
        ticket = secrets.token_urlsafe(32)
        with unavailable_as_client_error():
            expires_at = await add_ticket(
                self._database,
                _hash(ticket),
                identity.user_id,
                token_expires_at=identity.expires_at,
                issued_at=identity.issued_at,
                limits=encode(identity.limits),
                lasts_seconds=TICKET_SECONDS,
                tickets_max=TICKETS_MAX,
            )
        if expires_at is None:
            raise RateLimited(
                f"You have {TICKETS_MAX} unused tickets; use one, or wait {TICKET_SECONDS:g} seconds.",
                limit="tickets_per_user_max",
                limit_max=TICKETS_MAX,
            )
        return ticket, expires_at

    async def redeem(self, ticket: str) -> Identity:
        """Use a ticket up. Returns the user that it was issued to, with the times and limits of the user's token.

        Raises Unauthorized or DatabaseUnavailable.
        """
        with unavailable_as_client_error():
            redeemed = await redeem_ticket(self._database, _hash(ticket))
        if redeemed is None:
            raise Unauthorized("the ticket is unknown, expired or used, or its token is no longer good")
        limits = self._limits
        if redeemed.limits is not None:
            limits = msgspec.json.decode(redeemed.limits, type=UserLimits)
        return Identity(redeemed.user_id, redeemed.token_expires_at, issued_at=redeemed.issued_at, limits=limits)


def _hash(ticket: str) -> str:
    return hashlib.sha256(ticket.encode()).hexdigest()
