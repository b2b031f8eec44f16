"""The turns that this node runs: where they begin, and where they are forgotten."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final
from uuid import UUID

from anynode.models.database import Database
from anynode.models.events import Event
from anynode.server import metrics
from anynode.server.agents.agent import Agent, Turn
from anynode.server.engine.cursor import Log
from anynode.server.engine.follow import Follows
from anynode.server.engine.journal import Journal
from anynode.server.engine.turn import TurnRunner
from anynode.server.settings import Settings

logger = logging.getLogger("anynode.node")

DRAIN_POLL_SECONDS: Final = 0.05


class RunningTurns:
    """The turns that run on this node, by id. Nothing that they say is committed unless `journal.run` is running."""

    def __init__(self, settings: Settings, database: Database, follows: Follows) -> None:
        self.journal = Journal(
            database,
            flush_interval_seconds=settings.flush_interval_ms / 1000,
            attempt_seconds=max(0.5, settings.lease_seconds * 0.3),
        )
        self._to_start: set[UUID] = set()
        self._starting = 0
        self._settings = settings
        self._follows = follows
        self._turns: dict[UUID, TurnRunner] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        # Those that may be about to run count: of many admissions at once, all would find the same room otherwise.
        return len(self._turns) + len(self._to_start)

    def get(self, turn_id: UUID) -> TurnRunner | None:
        """Return the turn, or None if it does not run here."""
        return self._turns.get(turn_id)

    def all(self) -> list[TurnRunner]:
        """Return a list of the turns that run now."""
        return list(self._turns.values())

    def known(self) -> set[UUID]:
        """Return the ids of the turns that run here, or may be about to."""
        return self._turns.keys() | self._to_start

    @contextmanager
    def starting(self, *turn_ids: UUID) -> Iterator[None]:
        """Announce that turns may begin within this context.

        A drain waits for it, and a takeover counts `turn_ids` as known here.
        """
        self._starting += 1
        self._to_start.update(turn_ids)
        try:
            yield
        finally:
            self._starting -= 1
            self._to_start.difference_update(turn_ids)

    def start(
        self, turn: Turn, agent: Agent, events: Sequence[Event], trusted_until: float, *, epoch: int = 1
    ) -> TurnRunner:
        """Let `agent` answer a turn whose first `events` are committed, under the epoch in which this node owns it.

        Its lease is trusted until `trusted_until`, by the monotonic clock.
        """
        if (earlier := self._turns.get(turn.turn_id)) is not None:
            earlier.lose()  # this node has taken over its own turn: the database's clock is far ahead
        log = self._follows.start_log(turn.conversation_id, events)
        journal = self.journal.open(turn.turn_id, epoch, events[-1].seq + 1, self._publisher(turn, log))
        running = TurnRunner(
            agent,
            turn,
            journal,
            timeout_seconds=self._settings.agent_timeout_seconds,
            seconds_max=self._settings.turn_seconds_max,
            answer_bytes_max=self._settings.answer_bytes_max,
        )
        running.lease_until = trusted_until
        self._turns[turn.turn_id] = running
        metrics.turns_running.inc()
        journal.closed.add_done_callback(lambda _: self._forget(running, log))
        self.spawn(self._run_turn(running))
        return running

    def spawn(self, work: Coroutine[Any, Any, None], *turn_ids: UUID) -> None:
        """Run a coroutine that a drain waits for, and in which the turns `turn_ids` may begin."""

        def forget(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            self._to_start.difference_update(turn_ids)

        task = asyncio.create_task(work)
        self._tasks.add(task)
        self._to_start.update(turn_ids)  # now, as a takeover may be asked for before the task runs
        task.add_done_callback(forget)

    def _publisher(self, turn: Turn, log: Log) -> Callable[[Sequence[Event], bool], None]:
        def publish(events: Sequence[Event], is_over: bool) -> None:
            self._follows.extend_log(turn.conversation_id, log, events, is_over=is_over)

        return publish

    async def _run_turn(self, running: TurnRunner) -> None:
        if not await running.run():
            metrics.turns_lost.inc()
            logger.warning("turn %s was given up: its lease is lost", running.turn.turn_id)

    def _forget(self, running: TurnRunner, log: Log) -> None:
        # Followers of a turn that is lost go on with what its next node commits.
        self._follows.end_log(running.turn.conversation_id, log, is_whole=not running.journal.is_lost)
        metrics.turns_running.dec()
        # A turn that was lost and taken over again has another entry under the same id.
        if self._turns.get(running.turn.turn_id) is running:
            del self._turns[running.turn.turn_id]

    async def wait_ended(self, within_seconds: float) -> None:
        """Wait until no turn runs any more, and none that was on its way can begin; at most `within_seconds`."""
        deadline = time.monotonic() + within_seconds
        while (self._tasks or self._starting) and (left_seconds := deadline - time.monotonic()) > 0:
            pause = min(left_seconds, DRAIN_POLL_SECONDS)
            if self._tasks:
                await asyncio.wait(set(self._tasks), timeout=pause)
            else:
                await asyncio.sleep(pause)
