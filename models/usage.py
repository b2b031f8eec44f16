"""What users spend and store: the limits that a statement has reached, and measuring what is stored.

A statement that stores something adds it up in `user_usage`, and deleting takes nothing away. So a user who has reached
a quota by that sum may be below it. Then what is stored is measured, by one caller in a minute, and the statement is
run again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import asyncpg

from anynode.models.database import Database, Unavailable
from anynode.models.queries import Bound, bind

logger = logging.getLogger("anynode.models")

MEASURE_SECONDS_MAX: Final = 10.0  # a user may store a million messages
MEASURED_AGAIN_MS: Final = 60_000  # what is stored is measured at most once in this time


@dataclass(frozen=True, slots=True)
class ReachedLimit:
    """A limit of a user that a statement would have passed: `name` is that of its setting, in small letters. Trying
    again can help after `retry_after_ms`; 0: once what the user stores has been measured."""

    name: str
    retry_after_ms: int


class OverQuota(Exception):
    """The user may store no more: `reached` says why."""

    def __init__(self, reached: ReachedLimit) -> None:
        super().__init__(reached.name)
        self.reached = reached


def reached_limit(row: asyncpg.Record) -> ReachedLimit | None:
    """Return the limit that a statement says it has reached, None where it has done what it should."""
    return None if row["refused_limit"] is None else ReachedLimit(row["refused_limit"], row["retry_after_ms"])


def _nothing() -> None:
    pass


async def run_within_quota(
    database: Database, user_id: str, statement: Bound, *, on_sent: Callable[[], object] = _nothing
) -> Sequence[asyncpg.Record]:
    """Run a statement that calls `anynode_count`, again where measuring has shown that there is room. Returns its rows.
    Raises OverQuota or Unavailable."""
    rows = await database.run(statement, on_sent=on_sent)
    reached = reached_limit(rows[0]) if rows else None
    if reached is not None and reached.retry_after_ms == 0 and await measure_stored(database, user_id):
        rows = await database.run(statement, on_sent=on_sent)
        reached = reached_limit(rows[0]) if rows else None
    if reached is not None:
        raise OverQuota(reached)
    return rows


async def measure_stored(database: Database, user_id: str) -> bool:
    """Measure what a user stores, unless another caller has begun to in the last minute. Returns whether it was
    measured. Raises Unavailable only where that is not for the time that measuring takes."""
    if not await database.run(bind("claim_measurement", user_id=user_id)):
        return False
    try:
        await database.run(
            bind("measure_stored", user_id=user_id),
            within_seconds=MEASURE_SECONDS_MAX,
            attempt_seconds=MEASURE_SECONDS_MAX,
        )
    except Unavailable as error:
        logger.warning("what a user stores could not be measured: %s", error)
        return False
    return True
