"""Ids that sort by the time they were made: UUID version 7 (RFC 9562), which PostgreSQL has only from 18 on."""

from __future__ import annotations

import os
import time
from uuid import UUID


def uuid7() -> UUID:
    """Return a new id: 48 bits of Unix milliseconds, then 74 random bits."""
    milliseconds = time.time_ns() // 1_000_000
    random = int.from_bytes(os.urandom(10))
    value = (milliseconds & 0xFFFF_FFFF_FFFF) << 80
    value |= 0x7000 << 64 | (random >> 68) << 64  # version 7 and 12 random bits
    value |= 0b10 << 62 | random & ((1 << 62) - 1)  # variant and 62 random bits
    return UUID(int=value)


def made_at(id: UUID) -> float:
    """Return when an id of `uuid7` was made, in Unix seconds, by the clock of the node that made it."""
    return (id.int >> 80) / 1000


def as_uuid(text: str) -> UUID | None:
    """Return the UUID that a text of 36 characters spells, or None."""
    try:
        return UUID(text) if len(text) == 36 else None
    except ValueError:
        return None
