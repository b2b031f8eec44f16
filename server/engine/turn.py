"""One running turn: the agent's events go to the journal as they come, and exactly one end follows them.

Nothing here waits for a client, or for the database; only tools do, for their calls to be committed. Whatever stops a
turn (the agent's end or error, a cancel, no progress, a lost lease), the first one counts; what the agent says
afterwards is not heard.
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

LETTING_GO_SECONDS: Final = 5.0  # how long an agent may take to let go of what it holds
AnyToolEvent = TypeVar("AnyToolEvent", ToolCall, ToolResult)

YIELD_EVERY: Final = 64  # events after which an agent that never waits lets the other turns run


@dataclass(slots=True)
class Said:
    """What the turn leaves behind so far: messages of completed steps, and the step that is being said."""

    messages: list[NewMessage] = field(default_factory=list)
    step: Step = field(default_factory=Step)
    bytes: int = 0


class RunningTurn:
    """A turn that this node runs, from its admission or takeover to the commit of its end."""

    def __init__(
        self, agent: Agent, turn: Turn, journal: TurnJournal, *, timeout_seconds: float, answer_bytes_max: int
    ) -> None:
        self.turn = turn
        self.journal = journal
        self.lease_until = 0.0  # by the monotonic clock
        self._agent = agent
        self._timeout_seconds = timeout_seconds
        self._answer_bytes_max = answer_bytes_max
        self._loop = asyncio.get_running_loop()
        self._stopped: asyncio.Future[None] = self._loop.create_future()
        self._progress_at = self._loop.time()
        self._started_at = time.monotonic()
        self._cleaner = TextCleaner()
        self._said = Said()
        self._has_spoken = False
        self._usage: Usage | None = None

    async def run(self) -> bool:
        """Run to the commit of the end (True), or until the turn is lost (False)."""
        if self._stopped.done():  # ended before it began
            return await self.journal.closed
        answering = asyncio.create_task(self._answer())
        self._watchdog = self._loop.call_later(self._timeout_seconds, self._check_progress)
        self.journal.closed.add_done_callback(lambda _: self._stop())
        try:
            await asyncio.wait((answering, self._stopped), return_when=asyncio.FIRST_COMPLETED)
            answering.cancel()
            if answering.done() and not self._stopped.done():
                self.fail("The agent's answer could not be ended.")
            return await self.journal.closed
        finally:
            # By now the end is committed: an agent that is slow to let go keeps nobody waiting.
            self._watchdog.cancel()
            answering.cancel()
            await asyncio.wait((answering,), timeout=LETTING_GO_SECONDS)
            if not answering.done():
                logger.error("the agent of turn %s does not stop when it is cancelled", self.turn.turn_id)
            elif not answering.cancelled() and (error := answering.exception()) is not None:
                logger.error("the agent of turn %s could not be closed", self.turn.turn_id, exc_info=error)

    def cancel(self) -> None:
        """Stop, and keep what was said."""
        self._end(CANCELLED)

    def fail(self, message: str, *, retryable: bool = False) -> None:
        """Stop with an error, and keep what was said."""
        self._end(FAILED, ErrorDetail(AgentFailed.code, clean(message), retryable))

    def keep(self, steps: Sequence[Step], text: str) -> None:
        """Begin with what earlier attempts have left: completed steps, and the text of the step that was cut."""
        for step in steps:
            self._said.step = step
            self._said.bytes += len(step.text.encode()) + sum(len(result.content.encode()) for result in step.results)
            self._complete_step()
        self._said.step.texts.append(text)
        self._said.bytes += len(text.encode())

    def lose(self) -> None:
        """The right to the turn is gone: stop without an end."""
        self.journal.lose()

    async def _answer(self) -> None:
        events = self._agent(self.turn)
        try:
            count = 0
            has_called = False
            async for event in events:
                self._progress_at = self._loop.time()
                self._hear(event)
                if isinstance(event, ToolCall):
                    has_called = True
                elif has_called:
                    # What runs from here on has a trace: a takeover finds the call, with its id.
                    has_called = False
                    await self.journal.committed()
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
                call = _storable(event)
                payload = encode(call)
                self._begin_step()
                if self._count(payload):
                    self._said.step.add_call(call)
                    self.journal.add_event("turn.tool_call", payload)
            case ToolResult():
                result = _storable(event)
                if self._count(result.content):
                    self._said.step.add_result(result)
                    self.journal.add_event("turn.tool_result", encode(result))
            case StepEnd():
                self._begin_step()
            case Usage():
                self._usage = event if self._usage is None else _sum(self._usage, event)
            case _:
                assert_never(event)

    def _hear_text(self, text: str) -> None:
        text = self._cleaner.clean(text)
        if not text:
            return
        self._begin_step()
        if self._count(text):
            self._said.step.texts.append(text)
            self.journal.add_text(text, is_urgent=not self._has_spoken)
            self._has_spoken = True

    def _count(self, text: str) -> bool:
        """Whether the turn may say this much more; where not, it has failed."""
        self._said.bytes += len(text) if text.isascii() else len(text.encode())
        if self._said.bytes <= self._answer_bytes_max:
            return True
        self.fail(f"The answer is longer than {self._answer_bytes_max} bytes (ANSWER_BYTES_MAX).")
        return False

    def _begin_step(self) -> None:
        """What comes next belongs to another step, if this one is complete."""
        if self._said.step.is_complete:
            self._complete_step()

    def _complete_step(self) -> None:
        said, step = self._said, self._said.step
        calls = encode(tool_calls_json(step.calls))
        said.messages.append(self._message("assistant", step.text, COMPLETED, tool_calls=calls))
        for result in step.results:
            status = FAILED if result.is_error else COMPLETED
            named = {"tool_name": result.tool_name, "tool_call_id": result.tool_call_id}
            said.messages.append(self._message("tool", result.content, status, **named))
        said.step = Step()

    def _message(
        self,
        role: str,
        content: str,
        status: str,
        *,
        tool_calls: str | None = None,
        tool_name: str | None = None,
        tool_call_id: str | None = None,
    ) -> NewMessage:
        number = len(self._said.messages) + 1
        now = datetime.now(UTC)
        return NewMessage(
            uuid7(), self.turn.user_id, number, role, content, status, now, tool_calls, tool_name, tool_call_id
        )

    def _end(self, status: str, error: ErrorDetail | None = None) -> None:
        if self._stopped.done():
            return
        if rest := self._cleaner.finish():
            self._hear_text(rest)
            if self._stopped.done():  # the rest was too much
                return
        said = self._said
        if said.step.results:
            said.step.cut()
            self._complete_step()
        message = self._message("assistant", said.step.text, status)
        said.messages.append(message)
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
                said.messages,
                error=None if error is None else encode(error),
                usage=encode(usage),
            ),
        )
        metrics.turns_ended.labels(status).inc()
        self._stop()

    def _total_usage(self) -> TurnUsage:
        seconds = time.monotonic() - self._started_at
        if self.turn.attempt > 1:  # it began on another node, whose clock said when
            seconds = max(seconds, time.time() - made_at(self.turn.turn_id))
        seconds = round(seconds, 3)
        if self._usage is None:
            return TurnUsage(None, None, None, seconds)
        return TurnUsage(self._usage.input_tokens, self._usage.output_tokens, clean(self._usage.model), seconds)

    def _stop(self) -> None:
        if not self._stopped.done():
            self._stopped.set_result(None)

    def _check_progress(self) -> None:
        silent_seconds = self._loop.time() - self._progress_at
        if self._stopped.done():
            return
        if silent_seconds >= self._timeout_seconds:
            self.fail(f"The agent said nothing for {self._timeout_seconds:g} seconds.", retryable=True)
        else:
            self._watchdog = self._loop.call_later(self._timeout_seconds - silent_seconds, self._check_progress)


def _storable(event: AnyToolEvent) -> AnyToolEvent:
    """The event as Postgres can hold it. Raises msgspec.ValidationError where a field is of a wrong kind, which Structs
    do not check by themselves."""
    return msgspec.convert(clean(msgspec.structs.asdict(event)), type(event))


def _sum(one: Usage, other: Usage) -> Usage:
    return Usage(
        one.input_tokens + other.input_tokens, one.output_tokens + other.output_tokens, other.model or one.model
    )
