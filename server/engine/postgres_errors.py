"""Where what Postgres cannot do at the moment becomes an error that clients can be told of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

from anynode.models.database import Unavailable
from anynode.server.errors import DatabaseUnavailable


@contextmanager
def unavailable_as_client_error(conversation_id: UUID | None = None) -> Iterator[None]:
    """Turn Unavailable, which the database raises, into DatabaseUnavailable for a client."""
    try:
        yield
    except Unavailable as error:
        raise DatabaseUnavailable(conversation_id=conversation_id) from error
