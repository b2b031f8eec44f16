"""A node: it admits messages, runs turns, keeps their leases, takes over lapsed ones, and drains."""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from datetime import UTC, datetime
from typing import Any, Final, TypedDict, TypeVar
from uuid import UUID

from models.conversations import Admission, admit, regenerate
from models.database import Database, Unavailable
from models.events import Event
from models.ids import uuid7
from models.turns import (
    TakenTurn,
    delete_expired_events,
    release_leases,
    renew_leases,
    request_cancel,
    take_over,
    watch,
)
from server import metrics
from server.admission import history_of, question_of, raise_refusal
from server.agents.agent import Agent, Turn, can_continue
from server.encoding import encode
from server.errors import DatabaseUnavailable, Draining, NotFound, RateLimited
from server.follow import Follows, Log
from server.journal import Journal
from server.protocol import MessageSend, TurnRegenerate
from server.settings import Settings
from server.steps import history_of_steps, steps_in
from server.turn import RunningTurn

logger = logging.getLogger("anynode.node")

BEAT_SECONDS: Final = 1.0
WATCH_SECONDS: Final = 0.25
WATCH_TIMEOUT_SECONDS: Final = 2.0
BEGUN_MAX: Final = 10_000  # turns of the whole cluster in one watch
TAKEOVERS_AT_ONCE: Final = 100
EXPIRIES_AT_ONCE: Final = 100
INTERRUPT_SECONDS: Final = 5.0  # how long `if_busy: interrupt` waits for the running turn to end
INTERRUPT_POLL_SECONDS: Final = 0.05

Answer = TypeVar("Answer")


class AdmissionTerms(TypedDict):
    """What every admission by this node has in common."""

    node: str
    lease_seconds: float
    history_messages_max: int


class Node:
    """One server process among equals. `run` must be running for anything else to work."""

    def __init__(self, settings: Settings, database: Database, agent: Agent) -> None:
        self.node_id = f"{socket.gethostname()}-{secrets.token_hex(4)}"
        self.follows = Follows(database, snapshot_messages_max=settings.history_messages_max)
        self.is_draining = False
        self.is_running = True
        self._settings = settings
        self._database = database
        self._agent = agent
        self._journal = Journal(database, flush_interval_seconds=settings.flush_interval_ms / 1000)
        self._turns: dict[UUID, RunningTurn] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._take_over_soon = asyncio.Event()
        # A node trusts a lease for less than it lasts: clocks drift, and the agent takes a moment to stop.
        self._trusted_seconds = settings.lease_seconds * 0.8

    async def run(self) -> None:
        """Flush, beat and clean up until cancelled; it ends by itself only when the node has failed for good."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._journal.run())
                group.create_task(self._beat())
                group.create_task(self._watch())
                group.create_task(self._take_over_lapsed())
                group.create_task(self.follows.read_remote(self._take_over_soon.set))
                group.create_task(self._watch_leases())
                group.create_task(self._delete_expired())
        except Exception:
            logger.critical("the node has failed and must be restarted", exc_info=True)
        finally:
            self.is_running = False

    # Messages.

    async def send(self, user_id: str, frame: MessageSend) -> Admission:
        """Admit a message and start its turn, or find the turn that a repeated one has. Raises ClientError."""
        self._may_start(frame.conversation_id)
        question = question_of(user_id, frame, message_bytes_max=self._settings.message_bytes_max)
        # A turn whose node has died cannot be stopped before its lease has run out.
        give_up_at = time.monotonic() + self._settings.lease_seconds + INTERRUPT_SECONDS
        interrupted: UUID | None = None
        while True:
            trusted_until = self._trust()
            admission = await self._ask(admit(self._database, question, **self._terms()), question.conversation_id)
            if admission.outcome != "conversation_busy" or frame.if_busy != "interrupt":
                break
            if time.monotonic() > give_up_at:
                break
            if admission.turn_id != interrupted:
                interrupted = admission.turn_id
                await self.cancel(user_id, admission.conversation_id, interrupted)
            await asyncio.sleep(INTERRUPT_POLL_SECONDS)
        if admission.outcome == "admitted":
            assert admission.turn_id == question.turn_id
            events = [("message.created", question.message_created), ("turn.started", question.turn_started)]
            self._start_admitted(user_id, admission, events, trusted_until)
        raise_refusal(admission, frame)
        return admission

    async def regenerate(self, user_id: str, frame: TurnRegenerate) -> Admission:
        """Start a turn that answers the last question again; its old answer is superseded. Raises ClientError."""
        self._may_start(frame.conversation_id)
        trusted_until = self._trust()
        asked = regenerate(
            self._database,
            user_id,
            frame.conversation_id,
            frame.message_id,
            turn_id=uuid7(),
            created_at=datetime.now(UTC),
            **self._terms(),
        )
        admission = await self._ask(asked, frame.conversation_id)
        if admission.outcome == "admitted":
            events = [("turn.started", encode({"message_id": admission.client_id}))]
            self._start_admitted(user_id, admission, events, trusted_until)
        raise_refusal(admission, frame)
        return admission

    def _may_start(self, conversation_id: UUID | None) -> None:
        if self.is_draining:
            raise Draining(conversation_id=conversation_id)
        if len(self._turns) >= self._settings.turns_max:
            raise RateLimited("This node runs as many turns as it may.", conversation_id=conversation_id)

    def _terms(self) -> AdmissionTerms:
        return {
            "node": self.node_id,
            "lease_seconds": self._settings.lease_seconds,
            "history_messages_max": self._settings.history_messages_max,
        }

    def _trust(self) -> float:
        """Until when, by the monotonic clock, this node will trust a lease that it asks for now."""
        return time.monotonic() + self._trusted_seconds

    async def _ask(self, asked: Coroutine[Any, Any, Answer], conversation_id: UUID | None) -> Answer:
        try:
            return await asked
        except Unavailable as error:
            raise DatabaseUnavailable(conversation_id=conversation_id) from error

    def _start_admitted(
        self, user_id: str, admission: Admission, said: Sequence[tuple[str, str]], trusted_until: float
    ) -> None:
        assert admission.turn_id is not None
        if admission.first_seq is None:  # it is over, and its events are gone
            return
        turn_id = str(admission.turn_id)
        events = [Event(seq, type, turn_id, payload) for seq, (type, payload) in enumerate(said, admission.first_seq)]
        history = history_of(admission.history, admission.system_prompt or self._settings.system_prompt)
        turn = Turn(admission.turn_id, admission.conversation_id, user_id, history)
        self._start(turn, events, trusted_until)

    async def cancel(self, user_id: str, conversation_id: UUID, turn_id: UUID | None) -> None:
        """Ask for a turn to be stopped, wherever it runs. Where it has ended already, or none runs, that is all.
        Raises ClientError."""
        asked = request_cancel(self._database, user_id, conversation_id, turn_id)
        found = await self._ask(asked, conversation_id)
        if not found:
            raise NotFound(conversation_id=conversation_id)
        if found[0] is None:
            if turn_id is not None:
                raise NotFound("There is no such turn in this conversation.", conversation_id=conversation_id)
        elif (running := self._turns.get(found[0])) is not None:
            running.cancel()

    # Turns.

    def _start(self, turn: Turn, events: Sequence[Event], trusted_until: float) -> RunningTurn:
        log = self.follows.start_log(turn.conversation_id, events)
        journal = self._journal.open(turn.turn_id, turn.attempt, events[-1].seq + 1, self._publisher(turn, log))
        running = RunningTurn(
            self._agent,
            turn,
            journal,
            timeout_seconds=self._settings.agent_timeout_seconds,
            answer_bytes_max=self._settings.answer_bytes_max,
        )
        running.lease_until = trusted_until
        self._turns[turn.turn_id] = running
        metrics.turns_running.inc()
        journal.closed.add_done_callback(lambda _: self._forget(running, log))
        task = asyncio.create_task(self._run_turn(running))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return running

    def _publisher(self, turn: Turn, log: Log) -> Callable[[Sequence[Event], bool], None]:
        def publish(events: Sequence[Event], is_over: bool) -> None:
            self.follows.extend_log(turn.conversation_id, log, events, is_over=is_over)

        return publish

    async def _run_turn(self, running: RunningTurn) -> None:
        if not await running.run():
            metrics.turns_lost.inc()
            logger.warning("turn %s was given up: its lease is lost", running.turn.turn_id)

    def _forget(self, running: RunningTurn, log: Log) -> None:
        # Followers of a turn that is lost go on with what its next node commits.
        self.follows.end_log(running.turn.conversation_id, log, is_whole=not running.journal.is_lost)
        metrics.turns_running.dec()
        # A turn that was lost and taken over again has another entry under the same id.
        if self._turns.get(running.turn.turn_id) is running:
            del self._turns[running.turn.turn_id]

    # The beat, and the watch.

    async def _beat(self) -> None:
        beat_seconds = min(BEAT_SECONDS, self._settings.lease_seconds / 5)
        while True:
            started = time.monotonic()
            try:
                await self._renew()
            except Unavailable as error:
                logger.warning("the beat waits for Postgres: %s", error)
            except Exception:
                logger.exception("a beat failed")
            self._take_over_soon.set()
            await asyncio.sleep(max(0.0, started + beat_seconds - time.monotonic()))

    async def _watch(self) -> None:
        """Hear what other nodes want of this one's turns, and where turns have begun."""
        horizon: int | None = None
        while True:
            started = time.monotonic()
            try:
                news = await watch(
                    self._database,
                    node=self.node_id,
                    since=horizon,
                    limit=BEGUN_MAX,
                    within_seconds=WATCH_TIMEOUT_SECONDS,
                )
                for turn_id in news.to_cancel:
                    if (running := self._turns.get(turn_id)) is not None:
                        running.cancel()
                if horizon is None or news.horizon < horizon:  # another server, which may know less
                    self.follows.look_again()
                else:
                    self.follows.hear(news.begun)
                horizon = news.horizon
            except Unavailable as error:
                logger.warning("the watch waits for Postgres: %s", error)
                horizon = None
            except Exception:
                logger.exception("a watch failed")
                horizon = None
            await asyncio.sleep(max(0.0, started + WATCH_SECONDS - time.monotonic()))

    async def _take_over_lapsed(self) -> None:
        """At every beat, and at once where somebody here follows a turn whose node has died."""
        while True:
            await self._take_over_soon.wait()
            self._take_over_soon.clear()
            try:
                if not self.is_draining:
                    await self._take_over()
            except Unavailable as error:
                logger.warning("takeover waits for Postgres: %s", error)
            except Exception:
                logger.exception("a takeover failed")

    async def _renew(self) -> None:
        if not self._turns:
            return
        renewed = list(self._turns.values())
        trusted_until = self._trust()
        held = await renew_leases(
            self._database,
            {running.turn.turn_id: running.turn.attempt for running in renewed},
            lease_seconds=self._settings.lease_seconds,
            within_seconds=self._trusted_seconds,
        )
        for running in renewed:
            if running.journal.closed.done():
                continue
            is_to_cancel = held.get(running.turn.turn_id)
            if is_to_cancel is not None:
                running.lease_until = trusted_until
                if is_to_cancel:
                    running.cancel()
            elif not running.journal.is_ending:
                running.lose()

    async def _take_over(self) -> None:
        trusted_until = self._trust()
        taken_turns = await take_over(
            self._database,
            node=self.node_id,
            lease_seconds=self._settings.lease_seconds,
            limit=TAKEOVERS_AT_ONCE,
            max_attempts=self._settings.max_attempts,
            can_continue=can_continue(self._agent),
            history_messages_max=self._settings.history_messages_max,
        )
        for taken in taken_turns:
            logger.info("taking over turn %s, attempt %d", taken.turn_id, taken.epoch)
            metrics.turns_taken_over.inc()
            self._continue(taken, trusted_until)

    def _continue(self, taken: TakenTurn, trusted_until: float) -> None:
        restarted = encode({"epoch": taken.epoch, "text": taken.text})
        steps, partial = steps_in(taken.journal)
        turn = Turn(
            taken.turn_id,
            taken.conversation_id,
            taken.user_id,
            history_of(taken.history, taken.system_prompt or self._settings.system_prompt),
            attempt=taken.epoch,
            steps=history_of_steps(steps),
            partial=partial,
        )
        event = Event(taken.seq, "turn.restarted", str(taken.turn_id), restarted)
        running = self._start(turn, [event], trusted_until)
        running.keep(steps, partial)
        if taken.cancel_requested:
            running.cancel()
        elif taken.epoch > self._settings.max_attempts:
            running.fail(f"The answer was interrupted {self._settings.max_attempts} times.", retryable=True)

    async def _watch_leases(self) -> None:
        # Apart from the beat, which may itself be waiting for a Postgres that does not answer.
        while True:
            await asyncio.sleep(self._settings.lease_seconds / 20)
            now = time.monotonic()
            for running in [running for running in self._turns.values() if running.lease_until < now]:
                logger.warning("the lease of turn %s has run out", running.turn.turn_id)
                running.lose()

    async def _delete_expired(self) -> None:
        retention_seconds = self._settings.journal_retention_minutes * 60
        while True:
            try:
                expired = EXPIRIES_AT_ONCE
                while expired == EXPIRIES_AT_ONCE:
                    expired = await delete_expired_events(
                        self._database, retention_seconds=retention_seconds, limit=EXPIRIES_AT_ONCE
                    )
            except Unavailable as error:
                logger.warning("expired events wait for Postgres: %s", error)
            except Exception:
                logger.exception("expired events could not be deleted")
            await asyncio.sleep(min(60.0, max(0.1, retention_seconds / 4)))

    # The end.

    async def drain(self, within_seconds: float) -> None:
        """Admit nothing more, let the running turns end, and hand over those that do not in time."""
        self.is_draining = True
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=within_seconds)
        left = list(self._turns.values())
        if left:
            logger.info("handing over %d turns", len(left))
            for running in left:
                running.lose()
            try:
                await release_leases(self._database, {r.turn.turn_id: r.turn.attempt for r in left})
            except Unavailable as error:
                logger.warning("the leases could not be released, and will lapse: %s", error)
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=1.0)
