"""Runs the tool calls that a model makes, all calls of a step at once.

A call that fails has a result too, which tells the model why. It never ends the turn.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import msgspec

from anynode.models.text import clean
from anynode.server.agents.agent import AgentEvent, HistoryMessage, TextDelta, ToolCall, ToolResult, Turn
from anynode.server.agents.tools import Tool, ToolContext
from anynode.server.protocol.encoding import encode
from anynode.server.settings import Settings

logger = logging.getLogger("anynode.tools")

THREADS_MAX: Final = 32
LIFE_SECONDS: Final = 3.0  # between signs of life while tools work
ERROR_CHARACTERS_MAX: Final = 1000
NO_ERRORS: Final[Mapping[str, str]] = MappingProxyType({})


class ToolRunner:
    """Runs the tool calls of all turns of a node.

    Async functions run in the node's loop. Others run in daemon threads, at most `THREADS_MAX` at once; the wait for a
    thread counts towards the call's timeout. A thread cannot be stopped: when its call has timed out, or its turn is
    over, it keeps its place until the function returns.
    """

    def __init__(self, tools: Sequence[Tool], settings: Settings) -> None:
        self.tools: Mapping[str, Tool] = {tool.name: tool for tool in tools}
        self._timeout_seconds = settings.tool_timeout_seconds
        self._result_bytes_max = settings.tool_result_bytes_max
        # A tool may take longer than an agent may be silent.
        self._life_seconds = min(LIFE_SECONDS, settings.agent_timeout_seconds / 3)
        # Not the loop's executor: its end waits for threads that are stuck.
        self._threads = asyncio.Semaphore(THREADS_MAX)
        self._left: set[asyncio.Task[ToolResult]] = set()  # calls that timed out, and have not let go yet

    async def run(
        self, turn: Turn, calls: Sequence[ToolCall], errors: Mapping[str, str] = NO_ERRORS
    ) -> AsyncGenerator[AgentEvent, None]:
        """Yield all `calls`, then the result of each as it comes, with empty texts in between while none comes.

        `errors` says for the ids of some calls why they cannot be run. When the generator is cancelled or closed, the
        tools are cancelled too, and it ends when they have stopped.
        """
        # Without an await in between, so that they are committed together.
        for call in calls:
            yield call
        if calls:
            yield TextDelta("")  # after it the calls are committed
        running: dict[asyncio.Task[ToolResult], ToolCall] = {}
        try:
            for call in calls:
                if call.tool_call_id in errors:
                    yield _error(call, errors[call.tool_call_id])
                else:
                    running[asyncio.create_task(self._result(turn, call))] = call
            loop = asyncio.get_running_loop()
            deadline = loop.time() + self._timeout_seconds
            while running and (left_seconds := deadline - loop.time()) > 0:
                pause = min(self._life_seconds, left_seconds)
                done, _ = await asyncio.wait(running, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    yield TextDelta("")
                for task in [task for task in running if task in done]:
                    yield _outcome(task, running.pop(task))
            for task, call in list(running.items()):
                del running[task]
                yield _outcome(task, call) if task.done() else self._given_up(task, call)
        finally:
            await _stop(running)

    def _given_up(self, task: asyncio.Task[ToolResult], call: ToolCall) -> ToolResult:
        """Cancel a call that has timed out. Its turn does not wait for it, as the tool may ignore the cancellation."""
        self._left.add(task)
        task.add_done_callback(self._left.discard)
        task.cancel()
        return _error(call, f"{call.tool_name} has not answered within {self._timeout_seconds:g} s")

    async def _result(self, turn: Turn, call: ToolCall) -> ToolResult:
        name = call.tool_name
        tool = self.tools.get(name)
        if tool is None:
            return _error(call, f"there is no tool {name!r}; there is: {', '.join(self.tools) or 'none'}")
        context = ToolContext(
            call.tool_call_id,
            name,
            turn.turn_id,
            turn.conversation_id,
            turn.user_id,
            attempt=turn.attempt,
            store=turn.store,
        )
        try:
            made = tool.bind(call.arguments, context)
        except msgspec.ValidationError as error:
            return _error(call, f"the arguments of {name} are not valid: {error}")
        try:
            returned = await (made() if tool.is_async else self._in_thread(name, made))
            if inspect.isawaitable(returned):
                returned = await returned
        except (Exception, SystemExit) as error:
            logger.exception("the tool %s failed in turn %s", name, turn.turn_id)
            return _error(call, f"{name} failed: {type(error).__name__}: {error}")
        return self._told(call, returned)

    def _told(self, call: ToolCall, returned: Any) -> ToolResult:
        if not isinstance(returned, str):
            try:
                returned = encode(returned)
            except (TypeError, ValueError, OverflowError, RecursionError) as error:
                logger.exception("what the tool %s returned cannot be told", call.tool_name)
                return _error(call, f"what {call.tool_name} returned is neither text nor JSON: {error}")
        content: str = clean(returned)
        size = len(content.encode())
        if size > self._result_bytes_max:
            limit = self._result_bytes_max
            return _error(call, f"the result of {call.tool_name} has {size} bytes, and may have {limit}: ask for less")
        return ToolResult(call.tool_call_id, call.tool_name, content)

    async def _in_thread(self, name: str, made: Callable[[], Any]) -> Any:
        await self._threads.acquire()
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()
        context = contextvars.copy_context()

        def hear(outcome: tuple[Any, BaseException | None]) -> None:
            self._threads.release()
            if not ended.done():
                ended.set_result(outcome)

        def work() -> None:
            try:
                outcome: tuple[Any, BaseException | None] = (context.run(made), None)
            except BaseException as error:  # noqa: BLE001  (raised again where it is awaited)
                outcome = (None, error)
            try:
                loop.call_soon_threadsafe(hear, outcome)
            except RuntimeError:
                pass  # the node has stopped meanwhile

        try:
            threading.Thread(target=work, name=f"tool {name}", daemon=True).start()
        except BaseException:
            self._threads.release()
            raise
        returned, error = await ended
        if error is not None and not isinstance(error, Exception):
            raise RuntimeError(repr(error)) from error  # as it is, it would stop more than the call
        if error is not None:
            raise error
        return returned


def messages_of(text: str, calls: Sequence[ToolCall], results: Sequence[ToolResult]) -> list[HistoryMessage]:
    """Return the messages of a completed step, as an agent sees them."""
    return [
        HistoryMessage("assistant", text, tool_calls_json(calls)),
        *(HistoryMessage("tool", result.content, None, result.tool_name, result.tool_call_id) for result in results),
    ]


def tool_calls_json(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    """Return the calls in the form that messages have them in."""
    return [
        {
            "id": call.tool_call_id,
            "type": "function",
            "function": {"name": call.tool_name, "arguments": encode(call.arguments)},
        }
        for call in calls
    ]


def _outcome(task: asyncio.Task[ToolResult], call: ToolCall) -> ToolResult:
    if task.cancelled():  # not by its turn, which would not be here
        return _error(call, f"{call.tool_name} was interrupted")
    if (error := task.exception()) is not None:
        logger.error("the tool %s failed", call.tool_name, exc_info=error)
        return _error(call, f"{call.tool_name} failed ({type(error).__name__})")
    return task.result()


def _error(call: ToolCall, text: str) -> ToolResult:
    text = clean(text)
    if len(text) > ERROR_CHARACTERS_MAX:
        text = text[: ERROR_CHARACTERS_MAX - 1] + "…"
    return ToolResult(call.tool_call_id, call.tool_name, text, is_error=True)


async def _stop(tasks: Collection[asyncio.Task[ToolResult]]) -> None:
    """Cancel all tasks, and wait until they have stopped, even if this is itself cancelled."""
    for task in tasks:
        task.cancel()
    interrupted: asyncio.CancelledError | None = None
    while left := [task for task in tasks if not task.done()]:
        try:
            await asyncio.wait(left)
        except asyncio.CancelledError as error:
            interrupted = error
    if interrupted is not None:
        raise interrupted
