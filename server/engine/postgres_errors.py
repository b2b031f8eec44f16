"""Where what Postgres cannot do at the moment becomes an error for clients, or a line in the log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

from anynode.models.database import Unavailable
from anynode.models.usage import OverQuota
from anynode.server.engine.user_limits import LimitsInForce, refused_by
from anynode.server.errors import DatabaseUnavailable
from anynode.server.logs import seldom


@contextmanager
def unavailable_as_client_error(conversation_id: UUID | None = None) -> Iterator[None]:
    """Turn Unavailable, which the database raises, into DatabaseUnavailable for a client."""
    try:
        yield
    except Unavailable as error:
        raise DatabaseUnavailable(conversation_id=conversation_id) from error


@contextmanager
def over_quota_as_client_error(limits: LimitsInForce, conversation_id: UUID | None = None) -> Iterator[None]:
    """Turn OverQuota, which statements that store something raise, into RateLimited for a client."""
    try:
        yield
    except OverQuota as error:
        raise refused_by(error.reached, limits, conversation_id) from error


def warn_of_wait(logger: logging.Logger, what: str, error: Unavailable) -> None:
    """Log that a task of the node waits for Postgres; once a minute, as all tasks wait for the same reason."""
    logger.warning("%s for Postgres: %s", what, error, extra=seldom(f"Postgres: {type(error.__cause__).__name__}"))
