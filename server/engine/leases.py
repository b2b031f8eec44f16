"""Leases: a node renews those of its turns, and takes over turns whose nodes have lost theirs.

Leases run by the database's clock. A node relies on one by its own monotonic clock, for less time than it was granted,
so a node that is cut off gives its turns up before another may take them over. A node that was paused cannot. Every
write of a turn therefore carries the turn's epoch, and Postgres refuses a stale one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final, Literal, TypeAlias, assert_never
from uuid import UUID

from anynode.models.admissions import read_history
from anynode.models.database import Database, Unavailable
from anynode.models.events import Event
from anynode.models.turns import TakenTurn, release_leases, renew_leases, take_over
from anynode.server import metrics
from anynode.server.agents.agent import Agent, AgentEvent, TextDelta, Turn, can_resume_calls
from anynode.server.engine.admission import agent_history, newest_of
from anynode.server.engine.postgres_errors import warn_of_wait
from anynode.server.engine.running_turns import RunningTurns
from anynode.server.engine.steps import history_of_steps, stands_up_to, steps_in
from anynode.server.engine.turn import TurnRunner
from anynode.server.protocol.encoding import encode
from anynode.server.settings import Settings

logger = logging.getLogger("anynode.node")

BEAT_SECONDS: Final = 1.0
OWNER_GONE: Final = "The process that answered has ended."
TAKEOVERS_AT_ONCE: Final = 20  # turns of one statement: so the nodes share the work, and no statement takes long


class LeaseClock:
    """How long this node may rely on a lease: 80 % of its duration, from before the request was sent.

    The rest is for clocks that drift and for agents that take a moment to stop. All times are of the monotonic clock.
    """

    def __init__(self, trusted_seconds: float) -> None:
        self._trusted_seconds = trusted_seconds
        self._started_at: float | None = None

    def start(self, now: float) -> None:
        """Note that the request is being sent. Only the first call counts: a repeated request may have been heard the
        first time."""
        if self._started_at is None:
            self._started_at = now

    @property
    def trusted_until(self) -> float:
        """The time up to which the lease is trusted; 0 if it was never requested."""
        return 0.0 if self._started_at is None else self._started_at + self._trusted_seconds


# What becomes of a turn of this node once Postgres has answered a renewal.
# keep: trust the new lease
# cancel: trust the new lease, and stop the turn, as some node was asked to
# lose: another node owns the turn, or it is gone
# give back: this node had lost the turn, and has renewed its lease all the same
# leave: the turn has ended, or its end is on its way
Renewal: TypeAlias = Literal["keep", "cancel", "lose", "give back", "leave"]


def renewal_of(cancel_requested: bool | None, *, is_lost: bool, is_closed: bool, is_ending: bool) -> Renewal:
    """Decide what becomes of a turn after a renewal. `cancel_requested` is None if the lease was not renewed.

    A turn whose end is on its way is left alone where its lease was not renewed: the end may be committed already, and
    an ended turn has no lease. If it is not, the flush is refused.
    """
    is_held = cancel_requested is not None
    if is_lost and is_held:
        return "give back"
    if is_closed:
        return "leave"
    if is_held:
        return "cancel" if cancel_requested else "keep"
    return "leave" if is_ending else "lose"


class Leases:
    """The leases of a node's turns. `may_take_over` is false once the node drains.

    `agent` goes on with the turns that `take_over_lapsed` finds, and `store` is given to them.
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        turns: RunningTurns,
        *,
        node_id: str,
        agent: Agent | None,
        store: Any = None,
    ) -> None:
        self.may_take_over = True
        self._settings = settings
        self._database = database
        self._turns = turns
        self._node_id = node_id
        self._agent = agent
        self._store = store
        self._take_over_soon = asyncio.Event()
        self._trusted_seconds = settings.lease_seconds * 0.8
        self._beat_seconds = min(BEAT_SECONDS, settings.lease_seconds / 5)

    def new(self) -> LeaseClock:
        """Return the clock of a lease that is about to be requested."""
        return LeaseClock(self._trusted_seconds)

    def take_over_soon(self) -> None:
        """Look for lapsed leases now: one is known to have run out."""
        self._take_over_soon.set()

    async def beat(self) -> None:
        """Renew the leases, and then look for lapsed ones, for ever."""
        while True:
            started = time.monotonic()
            try:
                await self._renew()
            except Unavailable as error:
                warn_of_wait(logger, "the beat waits", error)
            except Exception:
                logger.exception("a beat failed")
            self._take_over_soon.set()
            await asyncio.sleep(max(0.0, started + self._beat_seconds - time.monotonic()))

    async def take_over_lapsed(self) -> None:
        """Take over turns whose leases have lapsed, for ever: at every beat, and at once if one is followed here."""
        while True:
            await self._take_over_soon.wait()
            self._take_over_soon.clear()
            try:
                await self._take_over()
            except Unavailable as error:
                warn_of_wait(logger, "takeover waits", error)
            except Exception:
                logger.exception("a takeover failed")

    async def _renew(self) -> None:
        now = time.monotonic()
        renewed = [running for running in self._turns.all() if running.lease_until > now]
        if not renewed:
            return
        lease = self.new()
        lease.start(now)
        held = await renew_leases(
            self._database,
            {running.turn.turn_id: running.epoch for running in renewed},
            lease_seconds=self._settings.lease_seconds,
            within_seconds=self._trusted_seconds,
        )
        given_back: list[TurnRunner] = []
        for running in renewed:
            journal = running.journal
            renewal = renewal_of(
                held.get(running.turn.turn_id),
                is_lost=journal.is_lost,
                is_closed=journal.closed.done(),
                is_ending=journal.is_ending,
            )
            match renewal:
                case "keep":
                    running.lease_until = lease.trusted_until
                case "cancel":
                    running.lease_until = lease.trusted_until
                    running.cancel()
                case "lose":
                    running.lose()
                case "give back":
                    given_back.append(running)
                case "leave":
                    pass
                case _:
                    assert_never(renewal)
        if given_back:
            await self.release(given_back)

    async def release(self, turns: Sequence[TurnRunner]) -> None:
        """Let other nodes take these turns over at once; they must be lost here already."""
        try:
            await release_leases(self._database, {running.turn.turn_id: running.epoch for running in turns})
        except Unavailable as error:
            logger.warning("the leases could not be released, and will lapse: %s", error)

    async def _take_over(self) -> None:
        while self.may_take_over and await self._take_over_some(self._agent) == TAKEOVERS_AT_ONCE:
            pass

    async def take_over_turn(self, conversation_id: UUID, agent: Agent | None) -> bool:
        """Take over the turn that a Store has run in a conversation, if its lease has run out: `agent` goes on with it,
        or without one it ends as failed. Return whether there was such a turn. Raises Unavailable."""
        return await self._take_over_some(agent, conversation_id) > 0

    async def _take_over_some(self, agent: Agent | None, conversation_id: UUID | None = None) -> int:
        with self._turns.starting():
            lease = self.new()
            taken_turns = await take_over(
                self._database,
                node=self._node_id,
                known=self._turns.known(),
                lease_seconds=self._settings.lease_seconds,
                beat_seconds=self._beat_seconds,
                limit=TAKEOVERS_AT_ONCE,
                max_attempts=self._settings.max_attempts if agent is not None else 0,
                stands_up_to=stands_up_to(agent) if agent is not None else (),
                within_seconds=self._trusted_seconds,
                on_sent=lambda: lease.start(time.monotonic()),
                conversation_id=conversation_id,
            )
            for taken in taken_turns:
                logger.info("taking over turn %s, epoch %d", taken.turn_id, taken.epoch)
                metrics.turns_taken_over.inc()
                self._turns.spawn(self._continue(taken, lease, None if taken.agent_is_gone else agent), taken.turn_id)
        return len(taken_turns)

    async def _continue(self, taken: TakenTurn, lease: LeaseClock, agent: Agent | None) -> None:
        """Run a turn that was taken over, or end it where there is no agent for it. Each has its own task, so that an
        unreadable one does not stop the others."""
        messages_max = self._settings.history_messages_max
        try:
            found = await read_history(self._database, taken.conversation_id, messages_max=messages_max + 1)
        except Unavailable as error:
            logger.warning("turn %s is left to its lease: %s", taken.turn_id, error)
            return
        if found is None:
            logger.info("the conversation of turn %s has been deleted", taken.turn_id)
            return
        system_prompt, stored, is_cut_by_bytes = found
        newest, is_cut = newest_of(stored, messages_max)
        try:
            steps, partial, pending = steps_in(taken.standing_events)
            is_readable = True
        except Exception:
            logger.exception("the journal of turn %s cannot be read; the turn fails", taken.turn_id)
            steps, partial, pending, is_readable = [], taken.text, [], False
        turn = Turn(
            taken.turn_id,
            taken.conversation_id,
            taken.user_id,
            agent_history(newest, system_prompt or self._settings.system_prompt),
            attempt=taken.epoch,
            steps=history_of_steps(steps),
            partial=partial,
            pending=pending if agent is not None and can_resume_calls(agent) else (),
            history_is_cut=is_cut or is_cut_by_bytes,
            store=self._store,
        )
        restarted = encode({"epoch": taken.epoch, "text": taken.text})
        event = Event(taken.seq, "turn.restarted", str(taken.turn_id), restarted)
        running = self._turns.start(turn, agent or _nobody, [event], lease.trusted_until, epoch=taken.epoch)
        running.keep(steps, partial)
        if taken.cancel_requested:
            running.cancel()
        elif agent is None:
            running.fail(OWNER_GONE, retryable=True)
        elif taken.is_exhausted:
            running.fail(f"The answer was interrupted {self._settings.max_attempts} times.", retryable=True)
        elif not is_readable:
            running.fail("The answer was interrupted, and its stored part cannot be read.")

    async def drop_lapsed(self) -> None:
        """Give up the turns whose leases could not be renewed in time, for ever."""
        # A task of its own, as the beat may be waiting for a Postgres that does not answer.
        while True:
            await asyncio.sleep(self._settings.lease_seconds / 20)
            self._lose_lapsed(time.monotonic())

    def _lose_lapsed(self, now: float) -> None:
        for running in [running for running in self._turns.all() if running.lease_until < now]:
            logger.warning("the lease of turn %s has run out", running.turn.turn_id)
            running.lose()


async def _nobody(turn: Turn) -> AsyncIterator[AgentEvent]:
    """The agent of a turn that is ended before it runs."""
    raise AssertionError
    yield TextDelta("")
