"""A node: it admits messages, hears what other nodes do, and drains. `leases` and `running` have its turns."""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from datetime import UTC, datetime
from typing import Any, Final, TypedDict, TypeVar
from uuid import UUID

from anynode.models.conversations import Admission, admit, delete_conversation, regenerate
from anynode.models.database import Database, Unavailable
from anynode.models.events import Event
from anynode.models.ids import uuid7
from anynode.models.messages import append_messages
from anynode.models.tickets import delete_expired_tickets
from anynode.models.turns import delete_expired_events, delete_expired_messages, forget_deletions, request_cancel, watch
from anynode.server.agents.agent import Agent, Turn
from anynode.server.engine.admission import appended_of, history_of, question_of, raise_refusal
from anynode.server.engine.follow import Follows
from anynode.server.engine.leases import LeaseClock, Leases
from anynode.server.engine.running_turns import RunningTurns
from anynode.server.errors import ConversationBusy, DatabaseUnavailable, Draining, NotFound, RateLimited
from anynode.server.protocol.bodies import AnyPostedMessage
from anynode.server.protocol.encoding import encode
from anynode.server.protocol.frames import Message, MessageSend, TurnRegenerate
from anynode.server.settings import Settings

logger = logging.getLogger("anynode.node")

WATCH_SECONDS: Final = 0.25
WATCH_TIMEOUT_SECONDS: Final = 2.0
BEGUN_MAX: Final = 10_000  # turns of the whole cluster in one watch
EXPIRIES_AT_ONCE: Final = 100  # turns
EXPIRED_MESSAGES_AT_ONCE: Final = 1000
INTERRUPT_SECONDS: Final = 5.0  # how long `if_busy: interrupt` waits for the running turn to end
INTERRUPT_POLL_SECONDS: Final = 0.05
DELETIONS_KNOWN_SECONDS: Final = 60.0  # a node that was cut off for longer looks at everything again
CANCEL_SECONDS: Final = 2.0  # how long a deletion waits for a cancelled turn to end; its node may be dead

Result = TypeVar("Result")


class AdmissionTerms(TypedDict):
    """What every admission by this node has in common."""

    node: str
    lease_seconds: float
    history_messages_max: int


class Node:
    """One server process among equals. `run` must be running for anything else to work."""

    def __init__(self, settings: Settings, database: Database, agent: Agent) -> None:
        self.node_id = f"{settings.node_name or socket.gethostname()}-{secrets.token_hex(4)}"
        self.follows = Follows(database, snapshot_messages_max=settings.history_messages_max)
        self.is_running = True
        self.draining = asyncio.Event()
        self.drained = asyncio.Event()  # no turn runs here any more, and none will
        self._settings = settings
        self._database = database
        self._turns = RunningTurns(settings, database, agent, self.follows)
        self._leases = Leases(settings, database, self._turns, node_id=self.node_id, agent=agent)

    async def run(self) -> None:
        """Flush, beat and clean up until cancelled; it ends by itself only when the node has failed for good."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._turns.journal.run())
                group.create_task(self._leases.beat())
                group.create_task(self._leases.drop_lapsed())
                group.create_task(self._leases.take_over_lapsed())
                group.create_task(self.follows.read_remote(self._leases.take_over_soon))
                group.create_task(self._watch())
                group.create_task(self._delete_expired())
        except Exception:
            logger.critical("the node has failed and must be restarted", exc_info=True)
        finally:
            self.is_running = False

    @property
    def is_draining(self) -> bool:
        """Whether it takes no more work."""
        return self.draining.is_set()

    # Messages.

    async def send(
        self, user_id: str, frame: MessageSend, *, chat_id: str | None = None, stopped: UUID | None = None
    ) -> Admission:
        """Admit a message and start its turn, or find the turn that a repeated one has. `chat_id` is a client's own id
        of the conversation, which is made where there is none yet; `stopped` is a turn that was asked to stop, whose
        end is waited for. Raises ClientError."""

        async def attempt() -> Admission:
            # A new one each time: its ids and times are to be in the order of the conversation.
            question = question_of(user_id, frame, chat_id=chat_id, message_bytes_max=self._settings.message_bytes_max)
            with self._turns.starting(question.turn_id):
                lease = self._leases.new()
                asked = admit(self._database, question, on_sent=lambda: lease.start(time.monotonic()), **self._terms())
                admission = await self._ask(asked, question.conversation_id)
                if admission.outcome == "admitted":
                    said = [("message.created", question.message_created), ("turn.started", question.turn_started)]
                    self._start_admitted(user_id, admission, said, lease)
            return admission

        interrupts = frame.if_busy == "interrupt"
        admission = await self._admitted(user_id, frame.conversation_id, attempt, interrupts, stopped)
        raise_refusal(admission, frame)
        return admission

    async def regenerate(
        self, user_id: str, frame: TurnRegenerate, *, interrupts: bool = False, stopped: UUID | None = None
    ) -> Admission:
        """Start a turn that answers the last question again; its old answer is superseded. `interrupts`: a turn that
        runs is cancelled first. Raises ClientError."""

        async def attempt() -> Admission:
            turn_id = uuid7()
            with self._turns.starting(turn_id):
                lease = self._leases.new()
                asked = regenerate(
                    self._database,
                    user_id,
                    frame.conversation_id,
                    frame.message_id,
                    turn_id=turn_id,
                    created_at=datetime.now(UTC),
                    on_sent=lambda: lease.start(time.monotonic()),
                    **self._terms(),
                )
                admission = await self._ask(asked, frame.conversation_id)
                if admission.outcome == "admitted":
                    said = [("turn.started", encode({"message_id": admission.client_id}))]
                    self._start_admitted(user_id, admission, said, lease)
            return admission

        admission = await self._admitted(user_id, frame.conversation_id, attempt, interrupts, stopped)
        raise_refusal(admission, frame)
        return admission

    async def _admitted(
        self,
        user_id: str,
        conversation_id: UUID | None,
        attempt: Callable[[], Awaitable[Admission]],
        interrupts: bool,
        stopped: UUID | None,
    ) -> Admission:
        """What becomes of an attempt at an admission; one that `interrupts` cancels the turn that runs, and waits, as
        it does for one that was `stopped`."""
        # A turn whose node has died cannot be stopped before its lease has run out.
        give_up_at = time.monotonic() + self._settings.lease_seconds + INTERRUPT_SECONDS
        interrupted: UUID | None = None
        while True:
            self._may_start(conversation_id)
            admission = await attempt()
            is_waited_for = interrupts or admission.turn_id == stopped
            if admission.outcome != "conversation_busy" or not is_waited_for or time.monotonic() > give_up_at:
                return admission
            if admission.turn_id != interrupted:
                interrupted = admission.turn_id
                await self.cancel(user_id, admission.conversation_id, interrupted)
            await asyncio.sleep(INTERRUPT_POLL_SECONDS)

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

    async def _ask(self, asked: Coroutine[Any, Any, Result], conversation_id: UUID | None) -> Result:
        try:
            return await asked
        except Unavailable as error:
            raise DatabaseUnavailable(conversation_id=conversation_id) from error

    def _start_admitted(
        self, user_id: str, admission: Admission, said: Sequence[tuple[str, str]], lease: LeaseClock
    ) -> None:
        assert admission.turn_id is not None
        if admission.first_seq is None or self._turns.get(admission.turn_id) is not None:
            return  # it is over, and its events are gone; or it has been taken over here before this answer came
        turn_id = str(admission.turn_id)
        events = [Event(seq, type, turn_id, payload) for seq, (type, payload) in enumerate(said, admission.first_seq)]
        history = history_of(admission.history, admission.system_prompt or self._settings.system_prompt)
        turn = Turn(admission.turn_id, admission.conversation_id, user_id, history)
        self._turns.start(turn, events, lease.trusted_until)

    async def cancel(self, user_id: str, conversation_id: UUID, turn_id: UUID | None) -> UUID | None:
        """Ask for a turn to be stopped, wherever it runs; returns its id. Where it has ended already, or none runs
        (None), that is all. Raises ClientError."""
        asked = request_cancel(self._database, user_id, conversation_id, turn_id)
        found = await self._ask(asked, conversation_id)
        if not found:
            raise NotFound(conversation_id=conversation_id)
        if found[0] is None:
            if turn_id is not None:
                raise NotFound("There is no such turn in this conversation.", conversation_id=conversation_id)
        elif (running := self._turns.get(found[0])) is not None:
            running.cancel()
        return found[0]

    # Without a turn.

    async def append(
        self, user_id: str, conversation_id: UUID, given: Sequence[AnyPostedMessage]
    ) -> tuple[list[Message], int]:
        """Append messages, all or none, and ask no agent; returns them and the seq of the last one's event. Raises
        ClientError."""
        created_at = datetime.now(UTC)
        appending = append_messages(
            self._database,
            user_id,
            conversation_id,
            created_at=created_at,
            checked=lambda tail: appended_of(
                given,
                tail,
                created_at,
                message_bytes_max=self._settings.message_bytes_max,
                answer_bytes_max=self._settings.answer_bytes_max,
            ),
        )
        appended = await self._ask(appending, conversation_id)
        match appended.outcome:
            case "not_found":
                raise NotFound(conversation_id=conversation_id)
            case "conversation_busy":
                raise ConversationBusy(conversation_id=conversation_id)
        self.follows.hear({conversation_id: appended.last_seq})
        return [message for _, message in appended.messages], appended.last_seq

    async def delete(self, user_id: str, conversation_id: UUID) -> None:
        """Delete a conversation; a turn that runs is cancelled first, and not waited for long. Raises ClientError."""
        give_up_at = time.monotonic() + CANCEL_SECONDS
        while True:
            is_forced = time.monotonic() > give_up_at
            deleting = delete_conversation(self._database, user_id, conversation_id, is_forced=is_forced)
            outcome = await self._ask(deleting, conversation_id)
            if outcome != "conversation_busy":
                break
            await self.cancel(user_id, conversation_id, None)
            await asyncio.sleep(INTERRUPT_POLL_SECONDS)
        if outcome == "not_found":
            raise NotFound(conversation_id=conversation_id)
        self.follows.wake(conversation_id)

    # The other nodes.

    async def _watch(self) -> None:
        """Hear what other nodes want of this one's turns, and where turns have begun."""
        horizon: int | None = None
        heard_at = 0.0
        while True:
            started = time.monotonic()
            if started - heard_at > DELETIONS_KNOWN_SECONDS / 2:  # it was frozen
                horizon = None
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
                # Another server, which may know less; or more has happened than one answer tells.
                if horizon is None or news.horizon < horizon or len(news.begun) >= BEGUN_MAX:
                    self.follows.look_again()
                else:
                    self.follows.hear(news.begun)
                horizon, heard_at = news.horizon, started
            except Unavailable as error:
                logger.warning("the watch waits for Postgres: %s", error)
                horizon = None
            except Exception:
                logger.exception("a watch failed")
                horizon = None
            await asyncio.sleep(max(0.0, started + WATCH_SECONDS - time.monotonic()))

    async def _delete_expired(self) -> None:
        retention_seconds = self._settings.journal_retention_minutes * 60
        while True:
            try:
                await forget_deletions(self._database, after_seconds=DELETIONS_KNOWN_SECONDS)
                await delete_expired_tickets(self._database)
                for delete, limit in (
                    (delete_expired_events, EXPIRIES_AT_ONCE),
                    (delete_expired_messages, EXPIRED_MESSAGES_AT_ONCE),
                ):
                    while await delete(self._database, retention_seconds=retention_seconds, limit=limit) == limit:
                        pass
            except Unavailable as error:
                logger.warning("expired events wait for Postgres: %s", error)
            except Exception:
                logger.exception("expired events could not be deleted")
            await asyncio.sleep(min(60.0, max(0.1, retention_seconds / 4)))

    # The end.

    async def drain(self, within_seconds: float) -> None:
        """Admit nothing more, let the running turns end, and hand over those that do not in time."""
        self.draining.set()
        self._leases.may_take_over = False
        await self._turns.wait_ended(within_seconds)
        for _ in range(2):  # what was on its way may have begun after all
            if left := self._turns.all():
                logger.info("handing over %d turns", len(left))
                for running in left:
                    running.lose()
                await self._leases.release(left)
            await self._turns.wait_ended(1.0)
        self.drained.set()
