"""A node: one server process among equals. It admits messages, and drains; its parts run and follow turns."""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final
from uuid import UUID

from anynode.models.admissions import Admission, admit, answer, regenerate
from anynode.models.conversations import delete_conversation
from anynode.models.database import Database
from anynode.models.events import Event
from anynode.models.ids import uuid7
from anynode.models.turns import CancelRequest, request_cancel
from anynode.models.usage import measure_stored
from anynode.server.agents.agent import Agent, Turn
from anynode.server.auth.revocations import Revocations
from anynode.server.engine.admission import (
    AdmissionTerms,
    Admitted,
    admitted_by,
    agent_history,
    newest_of,
    question_of,
)
from anynode.server.engine.conversations import Conversations
from anynode.server.engine.follow import Follows
from anynode.server.engine.housekeeping import delete_expired
from anynode.server.engine.interrupts import Interrupts, repeat_while_busy
from anynode.server.engine.leases import LeaseClock, Leases
from anynode.server.engine.postgres_errors import unavailable_as_client_error
from anynode.server.engine.running_turns import RunningTurns
from anynode.server.engine.turn_reader import TurnReader
from anynode.server.engine.user_limits import LimitsInForce, limits_in_force, refused_by
from anynode.server.engine.users import Emails
from anynode.server.engine.watch import hear_cluster
from anynode.server.errors import Draining, NotFound, RateLimited
from anynode.server.limits import UserLimits
from anynode.server.protocol.bodies import AnyPostedMessage
from anynode.server.protocol.encoding import encode
from anynode.server.protocol.frames import Message, MessageSend, TurnRegenerate
from anynode.server.settings import Settings

logger = logging.getLogger("anynode.node")

INTERRUPT_SECONDS: Final = 5.0  # how long `if_busy: interrupt` waits for the running turn to end
DELETE_SECONDS: Final = 2.0  # how long a deletion waits for a cancelled turn to end; its node may be dead


class Node:
    """One server process among equals. `run` must be running for anything else to work.

    `conversations` and `turns` read what is stored, `follows` what is committed from now on.

    `agent` answers the turns, which are given the `store`. Without an agent, this is the node in a `Store`, which
    serves no clients: `send` brings the agent of each turn, and a turn is taken over only where `take_over_turn` asks
    for it. Its id begins with `store:`, by which other nodes know that they do not have the agents of its turns.

    `emails` are written while the node runs, if there are any to write. `revocations` are heard with the watch.
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        agent: Agent | None,
        *,
        store: Any = None,
        emails: Emails | None = None,
        revocations: Revocations | None = None,
    ) -> None:
        name = f"{settings.node_name or socket.gethostname()}-{secrets.token_hex(4)}"
        self.node_id = name if agent is not None else f"store:{name}"
        self.follows = Follows(database, snapshot_messages_max=settings.history_messages_max)
        self.conversations = Conversations(settings, database)
        self.turns = TurnReader(database, self.follows)
        self.is_running = True
        self.draining = asyncio.Event()
        self.drained = asyncio.Event()  # no turn runs here any more, and none will
        self._settings = settings
        self._database = database
        self._agent = agent
        self._store = store
        self._emails = emails
        self._revocations = revocations
        self._interrupts = Interrupts(self.follows, self.draining)
        self._running = RunningTurns(settings, database, self.follows)
        self._leases = Leases(settings, database, self._running, node_id=self.node_id, agent=agent, store=store)

    async def run(self) -> None:
        """Flush, beat and clean up until cancelled; it ends by itself only when the node has failed for good."""
        retention_seconds = self._settings.journal_retention_minutes * 60
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._running.journal.run())
                group.create_task(self._leases.beat())
                group.create_task(self._leases.drop_lapsed())
                group.create_task(self.follows.read_remote(self._leases.take_over_soon))
                group.create_task(
                    hear_cluster(self._database, self.node_id, self._running, self.follows, self._revocations)
                )
                if self._emails is not None:
                    group.create_task(self._emails.run())
                if self._agent is not None:
                    group.create_task(self._leases.take_over_lapsed())
                    group.create_task(delete_expired(self._database, retention_seconds=retention_seconds))
        except Exception:
            logger.critical("the node has failed and must be restarted", exc_info=True)
        finally:
            self.is_running = False

    @property
    def is_draining(self) -> bool:
        """Whether the node takes no more work."""
        return self.draining.is_set()

    async def drain(self, within_seconds: float) -> None:
        """Admit nothing more, let the running turns end, and hand over those that do not in time."""
        self.draining.set()
        self._leases.may_take_over = False
        await self._running.wait_ended(within_seconds)
        for _ in range(2):  # what was on its way may have begun after all
            if left := self._running.all():
                logger.info("handing over %d turns", len(left))
                for running in left:
                    running.lose()
                await self._leases.release(left)
            await self._running.wait_ended(1.0)
        self.drained.set()

    # Messages that begin a turn.

    async def send(
        self,
        user_id: str,
        frame: MessageSend,
        *,
        client_chat_id: str | None = None,
        wait_for: UUID | None = None,
        agent: Agent | None = None,
        limits: UserLimits | None = None,
    ) -> Admitted:
        """Admit a message and start its turn, or find the turn that a repeated one has.

        `client_chat_id` is a client's own id of the conversation, which is made where there is none yet. `wait_for` is
        a turn that was asked to stop: its end is waited for. `agent` is by default the node's. `limits` are those of
        the user; code in this process has none. Raises ClientError.
        """
        in_force = limits_in_force(limits, self._settings)

        async def attempt() -> Admission:
            # A new one each time: its ids and times are to be in the order of the conversation.
            question = question_of(
                user_id, frame, chat_id=client_chat_id, message_bytes_max=self._settings.message_bytes_max
            )
            first = [("message.created", question.message_created), ("turn.started", question.turn_started)]
            with self._running.starting(question.turn_id), unavailable_as_client_error(question.conversation_id):
                lease = self._leases.new()
                admission = await admit(
                    self._database,
                    question,
                    limits=in_force.json,
                    on_sent=lambda: lease.start(time.monotonic()),
                    **self._terms(),
                )
                self._start(user_id, admission, first, lease, agent or self._agent)
            return admission

        return await self._admitted(user_id, frame, attempt, in_force, frame.if_busy == "interrupt", wait_for)

    async def regenerate(
        self,
        user_id: str,
        frame: TurnRegenerate,
        *,
        interrupts: bool = False,
        wait_for: UUID | None = None,
        limits: UserLimits | None = None,
    ) -> Admitted:
        """Start a turn that answers the last question again; its old answer is superseded. `interrupts`: a turn that
        runs is cancelled first. `limits`: see `send`. Raises ClientError."""
        again = partial(regenerate, self._database, user_id, frame.conversation_id, frame.message_id)
        in_force = limits_in_force(limits, self._settings)
        return await self._answer_last(user_id, frame, again, in_force, interrupts, wait_for)

    async def answer(self, user_id: str, conversation_id: UUID, *, limits: UserLimits | None = None) -> Admitted:
        """Start a turn that answers the last message, a question that was appended and has no answer yet. `limits`: see
        `send`. Raises ClientError."""
        first = partial(answer, self._database, user_id, conversation_id)
        in_force = limits_in_force(limits, self._settings)
        return await self._answer_last(user_id, TurnRegenerate(conversation_id), first, in_force, False, None)

    async def _answer_last(
        self,
        user_id: str,
        frame: TurnRegenerate,
        begin: Callable[..., Awaitable[Admission]],
        limits: LimitsInForce,
        interrupts: bool,
        wait_for: UUID | None,
    ) -> Admitted:
        """Start the turn that `begin` admits, which answers a question that is there already. Raises ClientError."""

        async def attempt() -> Admission:
            turn_id = uuid7()
            with self._running.starting(turn_id), unavailable_as_client_error(frame.conversation_id):
                lease = self._leases.new()
                admission = await begin(
                    turn_id=turn_id,
                    created_at=datetime.now(UTC),
                    limits=limits.json,
                    on_sent=lambda: lease.start(time.monotonic()),
                    **self._terms(),
                )
                first = [("turn.started", encode({"message_id": admission.client_message_id}))]
                self._start(user_id, admission, first, lease, self._agent)
            return admission

        return await self._admitted(user_id, frame, attempt, limits, interrupts, wait_for)

    async def _admitted(
        self,
        user_id: str,
        frame: MessageSend | TurnRegenerate,
        attempt: Callable[[], Awaitable[Admission]],
        limits: LimitsInForce,
        interrupts: bool,
        wait_for: UUID | None,
    ) -> Admitted:
        """Make an attempt at an admission. One that `interrupts` cancels the turn that runs and is made again after its
        end, and so is one behind the turn to `wait_for`; see `interrupts`. Raises ClientError."""

        async def try_once(is_last: bool) -> Admission:
            self._check_room(frame.conversation_id)
            admission = await attempt()
            if admission.reached is not None and admission.reached.retry_after_ms == 0:
                with unavailable_as_client_error(frame.conversation_id):
                    if await measure_stored(self._database, user_id):
                        admission = await attempt()
            return admission

        def is_in_way(admission: Admission) -> bool:
            return admission.outcome == "conversation_busy" and (interrupts or admission.turn_id == wait_for)

        async def stop(admission: Admission, within_seconds: float) -> bool:
            if not is_in_way(admission):
                return False
            await self._stop(user_id, admission.conversation_id, admission.turn_id, within_seconds)
            return True

        # A turn whose node has died cannot be stopped before its lease has run out.
        give_up_at = time.monotonic() + self._settings.lease_seconds + INTERRUPT_SECONDS
        admission = await try_once(False)
        if is_in_way(admission):
            place = self._interrupts.one_at_a_time(
                user_id, admission.conversation_id, within_seconds=give_up_at - time.monotonic()
            )
            async with place as (has_waited, left_seconds):
                first = None if has_waited else admission  # those before have begun other turns
                admission = await repeat_while_busy(try_once, stop, within_seconds=left_seconds, first=first)
        if admission.reached is not None:
            raise refused_by(admission.reached, limits, frame.conversation_id)
        return admitted_by(user_id, admission, frame)

    async def _stop(self, user_id: str, conversation_id: UUID, turn_id: UUID | None, within_seconds: float) -> None:
        """Ask a turn (None: the running one) to stop, and wait for its end, at most `within_seconds`. Raises
        ClientError."""
        asked = await self._request_cancel(user_id, conversation_id, turn_id)
        if asked.turn_id is not None and asked.last_seq is not None:
            await self._interrupts.wait_end(
                user_id, conversation_id, asked.turn_id, asked.last_seq, within_seconds=within_seconds
            )

    def _check_room(self, conversation_id: UUID | None) -> None:
        if self.is_draining:
            raise Draining(conversation_id=conversation_id)
        if len(self._running) >= self._settings.turns_max:
            raise RateLimited(
                "This node is at its limit of running turns; try again.",
                conversation_id=conversation_id,
                limit="turns_max",
                limit_max=self._settings.turns_max,
            )

    def _terms(self) -> AdmissionTerms:
        return {
            "node": self.node_id,
            "lease_seconds": self._settings.lease_seconds,
            "history_messages_max": self._settings.history_messages_max + 1,  # one more shows that there are more
        }

    def _start(
        self,
        user_id: str,
        admission: Admission,
        first: Sequence[tuple[str, str]],
        lease: LeaseClock,
        agent: Agent | None,
    ) -> None:
        """Let an agent answer the turn of an admission, whose `first` events (type, JSON payload) are committed."""
        if admission.outcome != "admitted":
            return
        assert admission.turn_id is not None
        if admission.first_seq is None or self._running.get(admission.turn_id) is not None:
            return  # it is over, and its events are gone; or it has been taken over here before this answer came
        turn_id = str(admission.turn_id)
        events = [Event(seq, type, turn_id, payload) for seq, (type, payload) in enumerate(first, admission.first_seq)]
        assert agent is not None
        newest, is_cut = newest_of(admission.history, self._settings.history_messages_max)
        history = agent_history(newest, admission.system_prompt or self._settings.system_prompt)
        turn = Turn(
            admission.turn_id,
            admission.conversation_id,
            user_id,
            history,
            history_is_cut=is_cut or admission.history_is_cut,
            store=self._store,
        )
        self._running.start(turn, agent, events, lease.trusted_until)

    async def take_over_turn(self, conversation_id: UUID, agent: Agent | None) -> bool:
        """Take over the turn that a `Store` has run in a conversation, if its lease has run out: `agent` goes on with
        it, or without one it ends as failed. Return whether there was such a turn. Raises DatabaseUnavailable."""
        with unavailable_as_client_error(conversation_id):
            return await self._leases.take_over_turn(conversation_id, agent)

    async def cancel(self, user_id: str, conversation_id: UUID, turn_id: UUID | None) -> UUID | None:
        """Ask for a turn to be stopped, wherever it runs (`turn_id` None: the running one). Returns its id; None where
        none runs. A turn that has ended already stays as it is. Raises ClientError."""
        return (await self._request_cancel(user_id, conversation_id, turn_id)).turn_id

    async def _request_cancel(self, user_id: str, conversation_id: UUID, turn_id: UUID | None) -> CancelRequest:
        with unavailable_as_client_error(conversation_id):
            asked = await request_cancel(self._database, user_id, conversation_id, turn_id)
        if asked is None:
            raise NotFound(conversation_id=conversation_id)
        if asked.turn_id is None:
            if turn_id is not None:
                raise NotFound("There is no such turn in this conversation.", conversation_id=conversation_id)
        elif (running := self._running.get(asked.turn_id)) is not None:
            running.cancel()
        return asked

    def cancel_here(self, turn_id: UUID | None = None) -> None:
        """Stop a turn that runs on this node, or all of them (None), without a word to Postgres first."""
        for running in self._running.all():
            if turn_id in (None, running.turn.turn_id):
                running.cancel()

    def runs(self, turn_id: UUID) -> bool:
        """Return whether a turn runs on this node."""
        return self._running.get(turn_id) is not None

    async def wait_ended(self, within_seconds: float) -> None:
        """Wait until no turn runs here any more; at most `within_seconds`."""
        await self._running.wait_ended(within_seconds)

    # Without a turn.

    async def append(
        self,
        user_id: str,
        conversation_id: UUID,
        given: Sequence[AnyPostedMessage],
        *,
        limits: UserLimits | None = None,
    ) -> tuple[Sequence[Message], int]:
        """Append messages, all or none, and ask no agent; returns them and the seq of the last one's event. `limits`:
        see `send`. Raises ClientError."""
        messages, last_seq = await self.conversations.append(user_id, conversation_id, given, limits=limits)
        self.follows.hear({conversation_id: last_seq})
        return messages, last_seq

    async def delete(self, user_id: str, conversation_id: UUID) -> None:
        """Delete a conversation; a turn that runs is cancelled first, and not waited for long. Raises ClientError."""

        async def attempt(is_last: bool) -> str:  # the last one is forced, and finds no turn in its way
            with unavailable_as_client_error(conversation_id):
                return await delete_conversation(self._database, user_id, conversation_id, is_forced=is_last)

        async def stop(outcome: str, within_seconds: float) -> bool:
            if outcome != "conversation_busy":
                return False
            await self._stop(user_id, conversation_id, None, within_seconds)
            return True

        outcome = await repeat_while_busy(attempt, stop, within_seconds=DELETE_SECONDS)
        if outcome == "not_found":
            raise NotFound(conversation_id=conversation_id)
        self.follows.wake(conversation_id)
