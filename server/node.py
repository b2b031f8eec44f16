"""A node: it admits messages, runs turns, keeps their leases, takes over lapsed ones, and drains."""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Final
from uuid import UUID

from models.conversations import Admission, Question, StoredMessage, admit
from models.database import Database, Unavailable
from models.events import Event
from models.ids import uuid7
from models.rules import visible
from models.turns import (
    TakenTurn,
    delete_expired_events,
    release_leases,
    renew_leases,
    request_cancel,
    take_over,
)
from server import metrics
from server.agents.agent import Agent, HistoryMessage, Turn
from server.encoding import encode, tool_calls_of
from server.errors import (
    ConversationBusy,
    DatabaseUnavailable,
    Draining,
    InvalidFrame,
    MessageTooLarge,
    NotFound,
    RateLimited,
    RoleOrder,
)
from server.follow import Follows, Log
from server.journal import Journal
from server.protocol import Message, MessageSend
from server.settings import Settings
from server.turn import RunningTurn

logger = logging.getLogger("anynode.node")

BEAT_SECONDS: Final = 1.0
TAKEOVERS_AT_ONCE: Final = 100
EXPIRIES_AT_ONCE: Final = 100
TITLE_LENGTH: Final = 80
INTERRUPT_SECONDS: Final = 5.0  # how long `if_busy: interrupt` waits for the running turn to end


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
        self._tell_failure: Callable[[], None] = lambda: None
        # A node trusts a lease for less than it lasts: clocks drift, and the agent takes a moment to stop.
        self._trusted_seconds = settings.lease_seconds * 0.8

    async def run(self) -> None:
        """Flush, beat and clean up until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._journal.run())
                group.create_task(self._beat())
                group.create_task(self._watch_leases())
                group.create_task(self._delete_expired())
        except Exception:
            logger.critical("the node has failed and must be restarted", exc_info=True)
            self._tell_failure()
        finally:
            self.is_running = False

    def on_failure(self, tell: Callable[[], None]) -> None:
        """Have `tell` called when the node has failed for good."""
        self._tell_failure = tell

    # Messages.

    async def send(self, user_id: str, frame: MessageSend) -> Admission:
        """Admit a message and start its turn, or find the turn that a repeated one has. Raises ClientError."""
        if self.is_draining:
            raise Draining(conversation_id=frame.conversation_id)
        if not frame.content.strip():
            raise InvalidFrame("content is empty", conversation_id=frame.conversation_id)
        if len(frame.content.encode()) > self._settings.message_bytes_max:
            raise MessageTooLarge(
                f"The message is longer than {self._settings.message_bytes_max} bytes.",
                conversation_id=frame.conversation_id,
            )
        if len(self._turns) >= self._settings.turns_max:
            raise RateLimited("This node runs as many turns as it may.", conversation_id=frame.conversation_id)
        question = _question(user_id, frame)
        give_up_at = time.monotonic() + INTERRUPT_SECONDS
        while True:
            admission = await self._admit(question)
            if not (admission.outcome == "conversation_busy" and frame.if_busy == "interrupt"):
                break
            if time.monotonic() > give_up_at:
                break
            await self._interrupt(user_id, admission.conversation_id)
        _raise_refusal(admission, frame)
        return admission

    async def _admit(self, question: Question) -> Admission:
        trusted_until = time.monotonic() + self._trusted_seconds
        try:
            admission = await admit(
                self._database,
                question,
                node=self.node_id,
                lease_seconds=self._settings.lease_seconds,
                history_messages_max=self._settings.history_messages_max,
            )
        except Unavailable as error:
            raise DatabaseUnavailable(conversation_id=question.conversation_id) from error
        if admission.outcome == "admitted" and admission.first_seq is not None:
            events = [
                Event(admission.first_seq, "message.created", str(question.turn_id), question.message_created),
                Event(admission.first_seq + 1, "turn.started", str(question.turn_id), question.turn_started),
            ]
            turn = Turn(
                question.turn_id,
                admission.conversation_id,
                question.user_id,
                self._history(admission.system_prompt, admission.history),
            )
            self._start(turn, events, trusted_until)
        return admission

    async def cancel(self, user_id: str, conversation_id: UUID, turn_id: UUID | None) -> None:
        """Ask for a turn to be stopped, wherever it runs. Where it has ended already, or none runs, that is all.
        Raises ClientError."""
        try:
            found = await request_cancel(self._database, user_id, conversation_id, turn_id)
        except Unavailable as error:
            raise DatabaseUnavailable(conversation_id=conversation_id) from error
        if not found:
            raise NotFound(conversation_id=conversation_id)
        if found[0] is None:
            if turn_id is not None:
                raise NotFound("There is no such turn in this conversation.", conversation_id=conversation_id)
        elif (running := self._turns.get(found[0])) is not None:
            running.cancel()

    async def _interrupt(self, user_id: str, conversation_id: UUID) -> None:
        await self.cancel(user_id, conversation_id, None)
        await asyncio.sleep(0.02)

    # Turns.

    def _history(self, system_prompt: str | None, stored: Sequence[StoredMessage]) -> list[HistoryMessage]:
        prompt = system_prompt or self._settings.system_prompt
        history = [HistoryMessage("system", prompt)] if prompt else []
        for message in visible(stored):
            if message.tool_calls is None and message.tool_call_id is None:
                history.append(HistoryMessage(message.role, message.content))
            else:
                calls = tool_calls_of(message.tool_calls)
                history.append(
                    HistoryMessage(message.role, message.content, calls, message.tool_name, message.tool_call_id)
                )
        return history

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
        self.follows.end_log(running.turn.conversation_id, log)
        metrics.turns_running.dec()
        # A turn that was lost and taken over again has another entry under the same id.
        if self._turns.get(running.turn.turn_id) is running:
            del self._turns[running.turn.turn_id]

    # The beat.

    async def _beat(self) -> None:
        while True:
            started = time.monotonic()
            try:
                await self._renew()
                if not self.is_draining:
                    await self._take_over()
            except Unavailable as error:
                logger.warning("the beat waits for Postgres: %s", error)
            except Exception:
                logger.exception("a beat failed")
            beat_seconds = min(BEAT_SECONDS, self._settings.lease_seconds / 5)
            await asyncio.sleep(max(0.0, started + beat_seconds - time.monotonic()))

    async def _renew(self) -> None:
        if not self._turns:
            return
        renewed = list(self._turns.values())
        trusted_until = time.monotonic() + self._trusted_seconds
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
        trusted_until = time.monotonic() + self._trusted_seconds
        taken_turns = await take_over(
            self._database,
            node=self.node_id,
            lease_seconds=self._settings.lease_seconds,
            limit=TAKEOVERS_AT_ONCE,
            max_attempts=self._settings.max_attempts,
            history_messages_max=self._settings.history_messages_max,
        )
        for taken in taken_turns:
            logger.info("taking over turn %s, attempt %d", taken.turn_id, taken.epoch)
            metrics.turns_taken_over.inc()
            self._continue(taken, trusted_until)

    def _continue(self, taken: TakenTurn, trusted_until: float) -> None:
        restarted = encode({"epoch": taken.epoch, "text": taken.text})
        turn = Turn(
            taken.turn_id,
            taken.conversation_id,
            taken.user_id,
            self._history(taken.system_prompt, taken.history),
            attempt=taken.epoch,
        )
        event = Event(taken.seq, "turn.restarted", str(taken.turn_id), restarted)
        running = self._start(turn, [event], trusted_until)
        running.keep(taken.text)
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


def _question(user_id: str, frame: MessageSend) -> Question:
    turn_id, message_id, now = uuid7(), uuid7(), datetime.now(UTC)
    message = Message(message_id, "user", frame.content, None, None, None, "completed", turn_id, now)
    return Question(
        user_id=user_id,
        conversation_id=frame.conversation_id,
        new_conversation_id=uuid7(),
        title=" ".join(frame.content.split())[:TITLE_LENGTH],
        message_id=message_id,
        client_id=frame.message_id,
        content=frame.content,
        created_at=now,
        turn_id=turn_id,
        message_created=encode({"message": message}),
        turn_started=encode({"message_id": frame.message_id}),
    )


def _raise_refusal(admission: Admission, frame: MessageSend) -> None:
    conversation_id = frame.conversation_id
    match admission.outcome:
        case "not_found":
            raise NotFound(conversation_id=conversation_id)
        case "conversation_busy":
            raise ConversationBusy(conversation_id=conversation_id)
        case "role_order":
            raise RoleOrder(
                f"After a message of role {admission.last_role} a user's may not come.", conversation_id=conversation_id
            )
        case "message_id_taken":
            raise InvalidFrame("message_id names a message of another conversation", conversation_id=conversation_id)
