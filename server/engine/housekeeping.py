"""What a node deletes when its time is over: events of the journal, tickets, the memory of deletions, revocations."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from anynode.models.database import Database, Unavailable
from anynode.models.revocations import forget_revocations
from anynode.models.tickets import delete_expired_tickets
from anynode.models.turns import delete_expired_events, delete_expired_messages, forget_deletions
from anynode.server.engine.postgres_errors import warn_of_wait
from anynode.server.engine.watch import DELETIONS_KNOWN_SECONDS

logger = logging.getLogger("anynode.node")

EXPIRIES_AT_ONCE: Final = 100  # turns
EXPIRED_MESSAGES_AT_ONCE: Final = 1000
REVOCATIONS_KEPT_SECONDS: Final = 366 * 86_400.0  # of single users; a token that lives longer is good again after that


async def delete_expired(database: Database, *, retention_seconds: float) -> None:
    """Delete what has expired, for ever: events of turns and messages after `retention_seconds`."""
    while True:
        try:
            await forget_deletions(database, after_seconds=DELETIONS_KNOWN_SECONDS)
            await delete_expired_tickets(database)
            await forget_revocations(database, after_seconds=REVOCATIONS_KEPT_SECONDS)
            for delete, limit in (
                (delete_expired_events, EXPIRIES_AT_ONCE),
                (delete_expired_messages, EXPIRED_MESSAGES_AT_ONCE),
            ):
                while await delete(database, retention_seconds=retention_seconds, limit=limit) == limit:
                    pass
        except Unavailable as error:
            warn_of_wait(logger, "expired events wait", error)
        except Exception:
            logger.exception("expired events could not be deleted")
        await asyncio.sleep(pause_seconds(retention_seconds))


def pause_seconds(retention_seconds: float) -> float:
    """Return how long to wait before looking again: a quarter of the retention, from 0.1 to 60 seconds."""
    return min(60.0, max(0.1, retention_seconds / 4))
