"""One running turn: the agent's events go to the journal as they come, and exactly one end follows them.

Nothing here waits for a client or for the database, with one exception: an agent is resumed after its tool calls only
once these are committed. A turn stops by its agent's end or error, a cancel, silence, the end of its time, or a lost
lease. The first of them counts, and events that the agent yields afterwards are ignored.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, TypeVar, assert_never

import msgspec

from anynode.models.events import Ending, NewMessage
from anynode.models.ids import made_at, uuid7
from anynode.models.rules import CANCELLED, COMPLETED, FAILED, TERMINAL_EVENTS
from anynode.models.text import TextCleaner, clean
from anynode.server import metrics
from anynode.server.agents.agent import (
    Agent,
    AgentError,
    AgentEvent,
    StepEnd,
    TextDelta,
    ToolCall,
    ToolResult,
    Turn,
    Usage,
)
from anynode.server.agents.tool_calls import tool_calls_json
from anynode.server.engine.journal import TurnJournal
from anynode.server.engine.steps import Step
from anynode.server.errors import AgentFailed
from anynode.server.protocol.encoding import encode
from anynode.server.protocol.frames import ErrorDetail, Message
from anynode.server.protocol.frames import Usage as TurnUsage

logger = logging.getLogger("anynode.turn")

AGENT_CLOSE_SECONDS: Final = 5.0  # how long a cancelled agent may take to release what it holds
AnyToolEvent = TypeVar("AnyToolEvent", ToolCall, ToolResult)

YIELD_EVERY: Final = 64  # events after which an agent that never waits lets the other turns run
TOKENS_MAX: Final = 2**53 - 1  # what every JSON reader takes exactly (RFC 8259, 6)
MODEL_CHARACTERS_MAX: Final = 200  # real names have under 100


@dataclass(slots=True)
class Draft:
    """The answer so far: the messages of completed steps, the step under way, and the size of everything said."""

    user_id: str
    bytes_max: int
    messages: list[NewMessage] = field(default_factory=list)
    step: Step = field(default_factory=Step)
    bytes: int = 0

    def count(self, text: str) -> bool:
        """Count text towards the answer's size. Return whether the answer is still within its limit."""
        self.bytes += len(text) if text.isascii() else len(text.encode())
        return self.bytes <= self.bytes_max

    def keep(self, steps: Sequence[Step], text: str, now: datetime) -> None:
        """Begin with what earlier attempts left: completed steps, and the text of the step that was cut."""
        for step in steps:
            self.step = step
            self.count(step.text)
            for result in step.results:
                self.count(result.content)
            self.complete_step(now)
        self.step.texts.append(text)
        self.count(text)

    def complete_step(self, now: datetime) -> None:
        """Turn the step into messages, and begin the next one."""
        step = self.step
        self._add("assistant", step.text, COMPLETED, now, tool_calls=encode(tool_calls_json(step.calls)))
        for result in step.results:
            status = FAILED if result.is_error else COMPLETED
            self._add("tool", result.content, status, now, tool_name=result.tool_name, tool_call_id=result.tool_call_id)
        self.step = Step()

    def finish(self, status: str, now: datetime) -> NewMessage:
        """Return the last message, with what was said since the last completed step. Calls without a result go."""
        if self.step.results:
            self.step.cut()
            self.complete_step(now)
        return self._add("assistant", self.step.text, status, now)

    def _add(
        self,
        role: str,
        content: str,
        status: str,
        now: datetime,
        *,
        tool_calls: str | None = None,
        tool_name: str | None = None,
        tool_call_id: str | None = None,
    ) -> NewMessage:
        number = len(self.messages) + 1
        message = NewMessage(
            uuid7(), self.user_id, number, role, content, status, now, tool_calls, tool_name, tool_call_id
        )
        self.messages.append(message)
        return message


class Patience:
    """How long an agent may still go on, by a clock that its owner reads.

    It may yield nothing for at most `silent_seconds_max`, and take `seconds_max` in all: one that yields empty text for
    ever is never silent.
    """

    __slots__ = ("began_at", "heard_at", "seconds_max", "silent_seconds_max")

    def __init__(self, silent_seconds_max: float, seconds_max: float, now: float) -> None:
        self.silent_seconds_max = silent_seconds_max
        self.seconds_max = seconds_max
        self.began_at = self.heard_at = now

    def seconds_left(self, now: float) -> float:
        """Return how long the agent need not be looked at again; 0 or less: it has used up one of its times."""
        return min(self.silent_seconds_max - (now - self.heard_at), self.seconds_in_all_left(now))

    def seconds_in_all_left(self, now: float) -> float:
        """Return how much is left of the time for the whole answer."""
        return self.seconds_max - (now - self.began_at)


class TurnRunner:
    """Runs one turn on this node, from its admission or takeover to the commit of its end."""

    def __init__(
        self,
        agent: Agent,
        turn: Turn,
        journal: TurnJournal,
        *,
        timeout_seconds: float,
        seconds_max: float,
        answer_bytes_max: int,
    ) -> None:
        self.turn = turn
        self.journal = journal
        self.lease_until = 0.0  # by the monotonic clock
        self._agent = agent
        self._loop = asyncio.get_running_loop()
        self._stopped: asyncio.Future[None] = self._loop.create_future()
        self._patience = Patience(timeout_seconds, seconds_max, self._loop.time())
        self._started_at = time.monotonic()
        self._cleaner = TextCleaner()
        self._draft = Draft(turn.user_id, answer_bytes_max)
        self._has_spoken = False
        self._watchdog: asyncio.TimerHandle | None = None
        self._usage: Usage | None = None

    @property
    def epoch(self) -> int:
        """The epoch under which this node owns the turn."""
        return self.journal.epoch

    async def run(self) -> bool:
        """Run the agent to the commit of the turn's end (True), or until the turn is lost (False)."""
        if self._stopped.done():  # ended before it began
            return await self.journal.closed
        answering = asyncio.create_task(self._answer())
        self._check_progress()
        self.journal.closed.add_done_callback(lambda _: self._stop())
        try:
            await asyncio.wait((answering, self._stopped), return_when=asyncio.FIRST_COMPLETED)
            answering.cancel()
            if answering.done() and not self._stopped.done():
                self.fail("The agent's answer could not be ended.")
            return await self.journal.closed
        finally:
            # By now the end is committed: nobody waits for an agent that is slow to stop.
            if self._watchdog is not None:
                self._watchdog.cancel()
            answering.cancel()
            await asyncio.wait((answering,), timeout=AGENT_CLOSE_SECONDS)
            if not answering.done():
                logger.error("the agent of turn %s does not stop when it is cancelled", self.turn.turn_id)
            elif not answering.cancelled() and (error := answering.exception()) is not None:
                logger.error("the agent of turn %s could not be closed", self.turn.turn_id, exc_info=error)

    def cancel(self) -> None:
        """Stop the agent, and end the turn as cancelled with the answer so far."""
        self._end(CANCELLED)

    def fail(self, message: str, *, retryable: bool = False) -> None:
        """Stop the agent, and end the turn as failed with the answer so far."""
        self._end(FAILED, ErrorDetail(AgentFailed.code, clean(message), retryable))

    def keep(self, steps: Sequence[Step], text: str) -> None:
        """Begin with what earlier attempts left: completed steps, and the text of the step that was cut."""
        self._draft.keep(steps, text, datetime.now(UTC))

    def lose(self) -> None:
        """Stop the agent without ending the turn: this node no longer owns it."""
        self.journal.lose()

    async def _answer(self) -> None:
        events = self._agent(self.turn)
        try:
            count = 0
            has_called = False
            async for event in events:
                self._patience.heard_at = self._loop.time()
                self._hear(event)
                if isinstance(event, ToolCall):
                    has_called = True
                elif has_called:
                    # Before the agent runs the tool, its call is committed: a takeover finds it, with its id.
                    has_called = False
                    await self.journal.wait_committed()
                count += 1
                if count % YIELD_EVERY == 0:
                    await asyncio.sleep(0)
                if self._stopped.done():
                    return
            self._end(COMPLETED)
        except AgentError as error:
            self.fail(error.message, retryable=error.retryable)
        except asyncio.CancelledError:
            if not self._stopped.done():  # nobody asked for it: the agent cancelled itself
                self.fail("The agent was interrupted.", retryable=True)
            raise
        except Exception as error:
            logger.exception("the agent failed in turn %s", self.turn.turn_id)
            self.fail(f"The agent failed ({type(error).__name__}); the server's log says more.")
        finally:
            close = getattr(events, "aclose", None)
            if close is not None:
                await close()

    def _hear(self, event: AgentEvent) -> None:
        if self._stopped.done():
            return
        match event:
            case TextDelta(text):
                self._hear_text(text)
            case ToolCall():
                self._hear_call(_storable(event))
            case ToolResult():
                self._hear_result(_storable(event))
            case StepEnd():
                self._begin_step()
            case Usage():
                used = _believable(event)
                self._usage = used if self._usage is None else _sum(self._usage, used)
            case _:
                assert_never(event)

    def _hear_text(self, text: str) -> None:
        text = self._cleaner.clean(text)
        if not text:
            return
        draft = self._draft
        if draft.step.is_complete:  # not `_begin_step`: one call less for each token
            draft.complete_step(datetime.now(UTC))
        if not draft.count(text):
            self._fail_too_long()
            return
        draft.step.texts.append(text)
        self.journal.add_text(text, is_urgent=not self._has_spoken)
        self._has_spoken = True

    def _hear_call(self, call: ToolCall) -> None:
        payload = encode(call)
        self._begin_step()
        if self._draft.count(payload):
            self._draft.step.add_call(call)
            self.journal.add_event("turn.tool_call", payload)
        else:
            self._fail_too_long()

    def _hear_result(self, result: ToolResult) -> None:
        if self._draft.count(result.content):
            self._draft.step.add_result(result)
            self.journal.add_event("turn.tool_result", encode(result))
        else:
            self._fail_too_long()

    def _begin_step(self) -> None:
        """Begin another step with what comes next, if the step under way is complete."""
        if self._draft.step.is_complete:
            self._draft.complete_step(datetime.now(UTC))

    def _fail_too_long(self) -> None:
        self.fail(f"The answer is longer than {self._draft.bytes_max} bytes (ANSWER_BYTES_MAX).")

    def _end(self, status: str, error: ErrorDetail | None = None) -> None:
        if self._stopped.done():
            return
        if rest := self._cleaner.finish():
            self._hear_text(rest)
            if self._stopped.done():  # the rest made the answer too long
                return
        message = self._draft.finish(status, datetime.now(UTC))
        usage = self._total_usage()
        shown = Message(
            message.id, message.role, message.content, None, None, None, status, self.turn.turn_id, message.created_at
        )
        payload: dict[str, object] = {"message": shown}
        if status == COMPLETED:
            payload["usage"] = usage
        if error is not None:
            payload["error"] = error
        self.journal.end(
            TERMINAL_EVENTS[status],
            encode(payload),
            Ending(
                status,
                self._draft.messages,
                error=None if error is None else encode(error),
                usage=encode(usage),
                tokens=(usage.input_tokens or 0) + (usage.output_tokens or 0),
            ),
        )
        metrics.turns_ended.labels(status).inc()
        self._stop()

    def _total_usage(self) -> TurnUsage:
        seconds = time.monotonic() - self._started_at
        if self.epoch > 1:  # the turn began on another node: its id says when, by that node's clock
            seconds = max(seconds, time.time() - made_at(self.turn.turn_id))
        seconds = round(seconds, 3)
        if self._usage is None:
            return TurnUsage(None, None, None, seconds)
        return TurnUsage(self._usage.input_tokens, self._usage.output_tokens, self._usage.model, seconds)

    def _stop(self) -> None:
        if not self._stopped.done():
            self._stopped.set_result(None)

    def _check_progress(self) -> None:
        if self._stopped.done():
            return
        patience, now = self._patience, self._loop.time()
        seconds_left = patience.seconds_left(now)
        if seconds_left > 0:
            self._watchdog = self._loop.call_later(seconds_left, self._check_progress)
        elif patience.seconds_in_all_left(now) <= 0:
            self.fail(f"The answer took longer than {patience.seconds_max:g} seconds (TURN_SECONDS_MAX).")
        else:
            self.fail(f"The agent said nothing for {patience.silent_seconds_max:g} seconds.", retryable=True)


def _storable(event: AnyToolEvent) -> AnyToolEvent:
    """Return the event as Postgres can hold it. Raises msgspec.ValidationError if a field has a wrong type, as Structs
    do not check that."""
    return msgspec.convert(clean(msgspec.structs.asdict(event)), type(event))


def _believable(usage: Usage) -> Usage:
    """Return the usage as it is counted and stored, whatever a provider says: numbers of tokens from 0 to TOKENS_MAX
    (what is no whole number counts as 0), and a name in one line of at most MODEL_CHARACTERS_MAX characters."""
    model = usage.model if isinstance(usage.model, str) else ""
    # Cut first: a name may have a megabyte.
    printable = "".join(each for each in model[:MODEL_CHARACTERS_MAX] if each.isprintable())
    return Usage(_tokens(usage.input_tokens), _tokens(usage.output_tokens), printable or None)


def _tokens(number: object) -> int:
    if isinstance(number, bool) or not isinstance(number, int):
        return 0
    return min(max(number, 0), TOKENS_MAX)


def _sum(one: Usage, other: Usage) -> Usage:
    return Usage(
        min(one.input_tokens + other.input_tokens, TOKENS_MAX),
        min(one.output_tokens + other.output_tokens, TOKENS_MAX),
        other.model or one.model,
    )
