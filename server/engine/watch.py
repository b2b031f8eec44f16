"""The watch: four times a second a node hears what the other nodes have done, in one statement.

It learns which of its own turns are to be cancelled, in which conversations turns have begun or which of them have been
deleted, and which tokens were revoked. Each watch asks for what is new since the horizon of the one before: all
transactions older than a horizon have ended, so none is ever missed, and some are heard of twice. After a gap it looks
at everything again: followers read, and all revocations are read in pages, after the watch that gave the new horizon.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from functools import partial
from typing import Final
from uuid import UUID

from anynode.models.database import Database, Unavailable
from anynode.models.revocations import read_revocations
from anynode.models.turns import News, watch
from anynode.server.auth.revocations import Revocations
from anynode.server.engine.follow import Follows
from anynode.server.engine.postgres_errors import warn_of_wait
from anynode.server.engine.running_turns import RunningTurns

logger = logging.getLogger("anynode.node")

WATCH_SECONDS: Final = 0.25
WATCH_TIMEOUT_SECONDS: Final = 2.0
BEGUN_MAX: Final = 10_000  # turns of the whole cluster in one watch
DELETIONS_KNOWN_SECONDS: Final = 60.0  # a node that was cut off for longer looks at everything again


class Horizon:
    """The horizon from which the next watch asks. Given the time; no I/O."""

    def __init__(self) -> None:
        self._horizon: int | None = None
        self._heard_at = 0.0

    def since(self, now: float) -> int | None:
        """Return the horizon to ask from, None after a gap in which deletions may have been forgotten."""
        if now - self._heard_at > DELETIONS_KNOWN_SECONDS / 2:  # the process was frozen
            self._horizon = None
        return self._horizon

    def hear(self, news: News, asked_at: float) -> Mapping[UUID, int] | None:
        """Take the answer to a watch. Returns the conversations in which something began (id → last seq), or None where
        it cannot be known: everything must be looked at again."""
        # The answer may come from another server, which knows less; or more has happened than one answer tells.
        is_cut = max(len(news.begun), len(news.revoked)) >= BEGUN_MAX
        is_gap = self._horizon is None or news.horizon < self._horizon or is_cut
        self._horizon, self._heard_at = news.horizon, asked_at
        return None if is_gap else news.begun

    def lose(self) -> None:
        """Forget the horizon: a watch has failed."""
        self._horizon = None


async def hear_cluster(
    database: Database,
    node_id: str,
    turns: RunningTurns,
    follows: Follows,
    revocations: Revocations | None = None,
) -> None:
    """Hear what other nodes want of this one's turns, where turns have begun and what was revoked, for ever.

    A node in a `Store` has no `revocations`: it verifies no tokens.
    """
    horizon = Horizon()
    while True:
        started = time.monotonic()
        try:
            since = horizon.since(started)
            news = await watch(
                database, node=node_id, since=since, limit=BEGUN_MAX, within_seconds=WATCH_TIMEOUT_SECONDS
            )
            if revocations is not None:
                revocations.hear(news.revoked)
            for turn_id in news.to_cancel:
                if (running := turns.get(turn_id)) is not None:
                    running.cancel()
            begun = horizon.hear(news, started)
            if begun is None:
                follows.look_again()
                if revocations is not None:
                    await _hear_all(database, revocations)
            else:
                follows.hear(begun)
        except Unavailable as error:
            warn_of_wait(logger, "the watch waits", error)
            horizon.lose()
        except Exception:
            logger.exception("a watch failed")
            horizon.lose()
        await asyncio.sleep(max(0.0, started + WATCH_SECONDS - time.monotonic()))


async def _hear_all(database: Database, revocations: Revocations) -> None:
    fetch = partial(database.run, within_seconds=WATCH_TIMEOUT_SECONDS, line="watch")
    async for page in read_revocations(fetch):
        revocations.hear(page)
