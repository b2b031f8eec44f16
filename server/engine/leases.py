"""Leases: a node keeps those of its turns, and takes over turns whose nodes have lost theirs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Final

from anynode.models.conversations import read_history
from anynode.models.database import Database, Unavailable
from anynode.models.events import Event
from anynode.models.turns import TakenTurn, release_leases, renew_leases, take_over
from anynode.server import metrics
from anynode.server.agents.agent import Agent, Turn, can_resume_calls
from anynode.server.engine.admission import agent_history
from anynode.server.engine.running_turns import RunningTurns
from anynode.server.engine.steps import history_of_steps, standing_events, steps_in
from anynode.server.engine.turn import RunningTurn
from anynode.server.protocol.encoding import encode
from anynode.server.settings import Settings

logger = logging.getLogger("anynode.node")

BEAT_SECONDS: Final = 1.0
TAKEOVERS_AT_ONCE: Final = 20  # in one statement: so that nodes share them, and none takes long


class Lease:
    """A lease that is being asked for: this node trusts it from when it `is_asked`, by the monotonic clock, for less
    than it lasts, as clocks drift and an agent takes a moment to stop."""

    def __init__(self, trusted_seconds: float) -> None:
        self._trusted_seconds = trusted_seconds
        self._asked_at: float | None = None

    def is_asked(self) -> None:
        """The statement is on its way. Where it is repeated, the first may be the one that was heard."""
        self._asked_at = self._asked_at or time.monotonic()

    @property
    def trusted_until(self) -> float:
        """0: it has never been asked for."""
        return self._asked_at + self._trusted_seconds if self._asked_at else 0.0


class Leases:
    """The leases of a node's turns. `may_take_over` is false from the beginning of its drain on."""

    def __init__(
        self, settings: Settings, database: Database, turns: RunningTurns, *, node_id: str, agent: Agent
    ) -> None:
        self.may_take_over = True
        self._settings = settings
        self._database = database
        self._turns = turns
        self._node_id = node_id
        self._standing = standing_events(agent)
        self._resumes_calls = can_resume_calls(agent)
        self._take_over_soon = asyncio.Event()
        self._trusted_seconds = settings.lease_seconds * 0.8
        self._beat_seconds = min(BEAT_SECONDS, settings.lease_seconds / 5)

    def new(self) -> Lease:
        """A lease, to be asked for."""
        return Lease(self._trusted_seconds)

    def take_over_soon(self) -> None:
        """A turn is known whose lease has run out."""
        self._take_over_soon.set()

    async def beat(self) -> None:
        """Renew the leases, and look for those that have run out, for ever."""
        while True:
            started = time.monotonic()
            try:
                await self._renew()
            except Unavailable as error:
                logger.warning("the beat waits for Postgres: %s", error)
            except Exception:
                logger.exception("a beat failed")
            self._take_over_soon.set()
            await asyncio.sleep(max(0.0, started + self._beat_seconds - time.monotonic()))

    async def take_over_lapsed(self) -> None:
        """At every beat, and at once where somebody here follows a turn whose node has died."""
        while True:
            await self._take_over_soon.wait()
            self._take_over_soon.clear()
            try:
                await self._take_over()
            except Unavailable as error:
                logger.warning("takeover waits for Postgres: %s", error)
            except Exception:
                logger.exception("a takeover failed")

    async def _renew(self) -> None:
        now = time.monotonic()
        renewed = [running for running in self._turns.all() if running.lease_until > now]
        if not renewed:
            return
        lease = self.new()
        lease.is_asked()
        held = await renew_leases(
            self._database,
            {running.turn.turn_id: running.turn.attempt for running in renewed},
            lease_seconds=self._settings.lease_seconds,
            within_seconds=self._trusted_seconds,
        )
        given_up: list[RunningTurn] = []
        for running in renewed:
            is_to_cancel = held.get(running.turn.turn_id)
            if running.journal.is_lost and is_to_cancel is not None:
                given_up.append(running)
            elif running.journal.closed.done():
                continue
            elif is_to_cancel is not None:
                running.lease_until = lease.trusted_until
                if is_to_cancel:
                    running.cancel()
            elif not running.journal.is_ending:
                running.lose()
        if given_up:
            await self.release(given_up)

    async def release(self, turns: Sequence[RunningTurn]) -> None:
        """Hand over turns that were lost on purpose."""
        try:
            await release_leases(self._database, {running.turn.turn_id: running.turn.attempt for running in turns})
        except Unavailable as error:
            logger.warning("the leases could not be released, and will lapse: %s", error)

    async def _take_over(self) -> None:
        is_more = True
        while is_more and self.may_take_over:
            with self._turns.starting():
                lease = self.new()
                taken_turns = await take_over(
                    self._database,
                    node=self._node_id,
                    known=self._turns.known(),
                    lease_seconds=self._settings.lease_seconds,
                    beat_seconds=self._beat_seconds,
                    limit=TAKEOVERS_AT_ONCE,
                    max_attempts=self._settings.max_attempts,
                    stands_up_to=self._standing,
                    within_seconds=self._trusted_seconds,
                    on_sent=lease.is_asked,
                )
                for taken in taken_turns:
                    logger.info("taking over turn %s, epoch %d", taken.turn_id, taken.epoch)
                    metrics.turns_taken_over.inc()
                    self._turns.spawn(self._continue(taken, lease), taken.turn_id)
            is_more = len(taken_turns) == TAKEOVERS_AT_ONCE

    async def _continue(self, taken: TakenTurn, lease: Lease) -> None:
        """Go on with a turn, each by itself, so that one that cannot be read does not keep the others."""
        try:
            found = await read_history(
                self._database, taken.conversation_id, messages_max=self._settings.history_messages_max
            )
        except Unavailable as error:
            logger.warning("turn %s is left to its lease: %s", taken.turn_id, error)
            return
        if found is None:
            logger.info("the conversation of turn %s has been deleted", taken.turn_id)
            return
        system_prompt, stored = found
        try:
            steps, partial, pending = steps_in(taken.standing_events)
            is_readable = True
        except Exception:
            logger.exception("what stands of turn %s cannot be read", taken.turn_id)
            steps, partial, pending, is_readable = [], taken.text, [], False
        turn = Turn(
            taken.turn_id,
            taken.conversation_id,
            taken.user_id,
            agent_history(stored, system_prompt or self._settings.system_prompt),
            attempt=taken.epoch,
            steps=history_of_steps(steps),
            partial=partial,
            pending=pending if self._resumes_calls else (),
        )
        restarted = encode({"epoch": taken.epoch, "text": taken.text})
        event = Event(taken.seq, "turn.restarted", str(taken.turn_id), restarted)
        running = self._turns.start(turn, [event], lease.trusted_until)
        running.keep(steps, partial)
        if taken.cancel_requested:
            running.cancel()
        elif taken.is_exhausted:
            running.fail(f"The answer was interrupted {self._settings.max_attempts} times.", retryable=True)
        elif not is_readable:
            running.fail("The answer was interrupted, and what stood of it cannot be read.")

    async def watch(self) -> None:
        """Stop the turns whose lease could not be renewed, for ever."""
        # Apart from the beat, which may itself be waiting for a Postgres that does not answer.
        while True:
            await asyncio.sleep(self._settings.lease_seconds / 20)
            now = time.monotonic()
            for running in [running for running in self._turns.all() if running.lease_until < now]:
                logger.warning("the lease of turn %s has run out", running.turn.turn_id)
                running.lose()
