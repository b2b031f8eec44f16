"""Running the calls of a step: all at once, each with a result, whatever the tools do."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any
from uuid import UUID

import pytest

from anynode.server.agents import tool_calls
from anynode.server.agents.agent import AgentEvent, HistoryMessage, TextDelta, ToolCall, ToolResult, Turn
from anynode.server.agents.tool_calls import ERROR_CHARACTERS_MAX, THREADS_MAX, ToolRunner
from anynode.server.agents.tools import ToolContext, make_tool
from anynode.server.settings import Settings

TURN = Turn(UUID(int=1), UUID(int=2), "ada", [HistoryMessage("user", "Hi")], attempt=3)
PATIENCE_SECONDS = 10


def runner(*functions: Callable[..., Any], **settings: Any) -> ToolRunner:
    return ToolRunner([make_tool(function) for function in functions], Settings(**settings))


def calls(*names: str, **arguments: Any) -> list[ToolCall]:
    return [ToolCall(f"call_{number}", name, arguments) for number, name in enumerate(names, 1)]


async def collect(tools: ToolRunner, asked: list[ToolCall], errors: dict[str, str] | None = None) -> list[AgentEvent]:
    async with asyncio.timeout(PATIENCE_SECONDS):
        return [event async for event in tools.run(TURN, asked, errors or {})]


async def result(function: Callable[..., Any], /, **arguments: Any) -> ToolResult:
    """What the only call of a function gives."""
    *_, last = await collect(runner(function), calls(function.__name__, **arguments))
    assert isinstance(last, ToolResult)
    return last


# What they return


async def test_a_text_is_the_result_as_it_is() -> None:
    async def tool(text: str) -> str:
        return text

    assert await result(tool, text='"ü"') == ToolResult("call_1", "tool", '"ü"')


@pytest.mark.parametrize(
    ("returned", "content"), [(None, "null"), (3, "3"), ({"ü": [1, None]}, '{"ü":[1,null]}'), (b"a", '"YQ=="')]
)
async def test_anything_else_is_the_result_as_json(returned: Any, content: str) -> None:
    def tool() -> Any:
        return returned

    assert await result(tool) == ToolResult("call_1", "tool", content)


async def test_a_text_that_cannot_be_stored_is_mended() -> None:
    def tool() -> str:
        return "a\0\ud83d\ude00\ud800"

    assert (await result(tool)).content == "a\ufffd\U0001f600\ufffd"


@pytest.mark.parametrize("returned", [object(), {object(): 1}, "\ud800".join])
async def test_what_is_neither_text_nor_json_is_an_error(returned: Any) -> None:
    def tool() -> Any:
        return returned

    failed = await result(tool)
    assert failed.is_error
    assert "what tool returned is neither text nor JSON" in failed.content


@pytest.mark.parametrize("text", ["x" * 100, "ü" * 50])
async def test_a_result_may_be_as_long_as_the_setting_says(text: str) -> None:
    async def tool(more: str) -> str:
        return text + more

    tools = runner(tool, tool_result_bytes_max=100)
    assert (await collect(tools, calls("tool", more="")))[-1] == ToolResult("call_1", "tool", text)
    (*_, longer) = await collect(tools, calls("tool", more="x"))
    assert isinstance(longer, ToolResult)
    assert longer.is_error
    assert longer.content == "the result of tool has 101 bytes, and may have 100: ask for less"


async def test_a_function_that_returns_something_to_await_is_awaited() -> None:
    async def inner() -> str:
        return "inner"

    def tool() -> Any:
        return inner()

    assert (await result(tool)).content == "inner"


# What goes wrong


async def test_an_exception_is_an_error_that_says_it_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def tool() -> None:
        raise ValueError("no such city")

    assert await result(tool) == ToolResult("call_1", "tool", "tool failed: ValueError: no such city", True)
    assert caplog.records[-1].exc_info is not None
    assert caplog.records[-1].exc_info[0] is ValueError


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    "error", [StopIteration(1), SystemExit(1), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError()]
)
async def test_what_would_stop_more_than_a_thread_is_an_error_of_its_call(error: BaseException) -> None:
    def tool() -> None:
        raise error

    assert (await result(tool)).is_error


@pytest.mark.parametrize("error", [StopAsyncIteration(1), SystemExit(1), asyncio.CancelledError(), Unprintable()])
async def test_what_would_stop_more_than_a_coroutine_is_an_error_of_its_call(error: BaseException) -> None:
    async def tool() -> None:
        raise error

    assert (await result(tool)).is_error


async def test_a_long_error_is_cut() -> None:
    def tool() -> None:
        raise ValueError("x" * 10_000)

    assert len((await result(tool)).content) == ERROR_CHARACTERS_MAX


async def test_arguments_that_do_not_fit_are_an_error_that_says_how() -> None:
    def tool(number: int) -> None: ...

    failed = await result(tool, number="3")
    assert failed.is_error
    assert failed.content == "the arguments of tool are not valid: Expected `int`, got `str` - at `$.number`"


async def test_a_tool_that_does_not_exist_is_an_error_that_names_those_that_do() -> None:
    def one() -> None: ...

    def two() -> None: ...

    (*_, failed) = await collect(runner(one, two), calls("three"))
    assert failed == ToolResult("call_1", "three", "there is no tool 'three'; there is: one, two", True)


async def test_a_call_that_cannot_be_run_is_not_and_says_why() -> None:
    ran = []

    async def tool() -> None:
        ran.append(1)

    events = await collect(runner(tool), calls("tool", "tool"), {"call_1": "no JSON"})
    assert events[-2:] == [ToolResult("call_1", "tool", "no JSON", True), ToolResult("call_2", "tool", "null")]
    assert ran == [1]


# At once


async def test_the_calls_come_first_then_a_pause_for_their_commit_and_each_result_when_it_is_there() -> None:
    opened = asyncio.Event()

    async def slow() -> str:
        await opened.wait()
        return "slow"

    async def quick() -> str:
        return "quick"

    asked = calls("slow", "quick")
    events = []
    async for event in runner(slow, quick).run(TURN, asked):
        events.append(event)
        if event == ToolResult("call_2", "quick", "quick"):
            opened.set()
    results = [ToolResult("call_2", "quick", "quick"), ToolResult("call_1", "slow", "slow")]
    assert events == [*asked, TextDelta(""), *results]


async def test_nothing_happens_between_the_calls() -> None:
    """Nor does a tool begin before all calls are told."""
    happened = []

    async def tool() -> None:
        happened.append("tool")

    asyncio.get_running_loop().call_soon(happened.append, "loop")
    events = runner(tool).run(TURN, calls("tool", "tool", "tool"))
    for _ in range(3):
        assert isinstance(await anext(events), ToolCall)
    assert happened == []
    await events.aclose()


@pytest.mark.parametrize("is_async", [True, False])
async def test_all_calls_of_a_step_run_at_once(*, is_async: bool) -> None:
    """Each waits for all the others."""
    together, threads = asyncio.Barrier(3), threading.Barrier(3)

    async def coroutine() -> None:
        await together.wait()

    def function() -> None:
        threads.wait(PATIENCE_SECONDS)

    tool = coroutine if is_async else function
    events = await collect(runner(tool), calls(*[tool.__name__] * 3))
    assert [event.is_error for event in events if isinstance(event, ToolResult)] == [False] * 3


async def test_the_context_says_which_call_of_whom_it_is() -> None:
    seen = []

    def tool(context: ToolContext) -> None:
        seen.append(context)

    await collect(runner(tool), calls("tool"))
    assert seen == [ToolContext("call_1", "tool", UUID(int=1), UUID(int=2), "ada", 3)]


async def test_context_variables_reach_the_thread_and_do_not_come_back() -> None:
    variable = contextvars.ContextVar("variable", default="unset")

    def tool() -> str:
        seen = variable.get()
        variable.set("by the tool")
        return seen

    variable.set("by the turn")
    assert (await result(tool)).content == "by the turn"
    assert variable.get() == "by the turn"


async def test_no_calls_are_no_events() -> None:
    assert await collect(runner(), []) == []


async def test_a_tool_that_takes_long_gives_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool_calls, "LIFE_SECONDS", 0.01)
    opened = asyncio.Event()

    async def tool() -> None:
        await opened.wait()

    events = []
    async for event in runner(tool).run(TURN, calls("tool")):
        events.append(event)
        if events.count(TextDelta("")) == 2:
            opened.set()
    assert events.count(TextDelta("")) >= 2
    assert events[-1] == ToolResult("call_1", "tool", "null")


def test_signs_of_life_come_sooner_than_an_agent_may_be_silent() -> None:
    assert runner(agent_timeout_seconds=0.3)._life_seconds == pytest.approx(0.1)
    assert runner(agent_timeout_seconds=3600.0)._life_seconds == tool_calls.LIFE_SECONDS


# Time out


async def test_a_call_that_takes_too_long_is_an_error_and_is_cancelled() -> None:
    cancelled = asyncio.Event()

    async def tool() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    events = await collect(runner(tool, tool_timeout_seconds=0.1), calls("tool"))
    assert events[-1] == ToolResult("call_1", "tool", "tool has not answered within 0.1 s", True)
    await asyncio.wait_for(cancelled.wait(), PATIENCE_SECONDS)


async def test_a_call_that_does_not_let_go_when_its_time_is_over_keeps_nobody_waiting() -> None:
    opened = asyncio.Event()

    async def tool() -> None:
        while not opened.is_set():
            try:
                await opened.wait()
            except asyncio.CancelledError:
                pass

    tools = runner(tool, tool_timeout_seconds=0.1)
    events = await collect(tools, calls("tool", "tool"))
    assert [event.tool_call_id for event in events if isinstance(event, ToolResult)] == ["call_1", "call_2"]
    opened.set()
    await asyncio.wait(tools._left, timeout=PATIENCE_SECONDS)
    assert tools._left == set()


@contextmanager
def gate() -> Iterator[threading.Event]:
    """What threads wait for; opened at the end, so that none is left."""
    opened = threading.Event()
    try:
        yield opened
    finally:
        opened.set()


async def test_a_thread_that_has_timed_out_makes_room_when_it_returns_and_not_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tool_calls, "THREADS_MAX", 1)
    with gate() as opened:

        def stuck() -> None:
            opened.wait(PATIENCE_SECONDS)

        def quick() -> str:
            return "quick"

        tools = runner(stuck, quick, tool_timeout_seconds=0.1)
        (*_, stopped) = await collect(tools, calls("stuck"))
        assert stopped == ToolResult("call_1", "stuck", "stuck has not answered within 0.1 s", True)
        (*_, waited) = await collect(tools, calls("quick"))
        assert waited == ToolResult("call_1", "quick", "quick has not answered within 0.1 s", True)
        opened.set()
        async with asyncio.timeout(PATIENCE_SECONDS):
            while tools._threads.locked():  # noqa: ASYNC110 (a thread tells nobody)
                await asyncio.sleep(0)
        assert (await collect(tools, calls("quick")))[-1] == ToolResult("call_1", "quick", "quick")


async def test_only_so_many_threads_run_at_once() -> None:
    running: set[int] = set()
    most = 0
    lock = threading.Lock()
    with gate() as opened:

        def tool(number: int) -> None:
            nonlocal most
            with lock:
                running.add(number)
                most = max(most, len(running))
                if len(running) == THREADS_MAX:
                    opened.set()
            opened.wait(PATIENCE_SECONDS)
            with lock:
                running.discard(number)

        asked = [ToolCall(f"call_{number}", "tool", {"number": number}) for number in range(THREADS_MAX + 8)]
        events = await collect(runner(tool), asked)
    assert sum(isinstance(event, ToolResult) and not event.is_error for event in events) == THREADS_MAX + 8
    assert most == THREADS_MAX


async def test_threads_do_not_outlive_the_process_and_are_not_those_of_the_loop() -> None:
    seen: list[threading.Thread] = []

    def tool() -> None:
        seen.append(threading.current_thread())

    await collect(runner(tool), calls("tool"))
    assert seen[0].daemon
    assert seen[0].name == "tool tool"


async def test_a_thread_that_cannot_start_is_an_error_and_takes_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def tool() -> None: ...

    tools = runner(tool)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        for event in (await collect(tools, calls(*["tool"] * (THREADS_MAX + 1))))[-THREADS_MAX - 1 :]:
            assert isinstance(event, ToolResult)
            assert event.is_error
    assert (await collect(tools, calls("tool")))[-1] == ToolResult("call_1", "tool", "null")


# Cancellation


class Holding:
    """Tools that wait, and say when they have begun and when they have let go."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.may_let_go = asyncio.Event()
        self.let_go = 0

    async def tool(self) -> None:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            await self.may_let_go.wait()
            self.let_go += 1


@pytest.fixture
async def holding() -> AsyncIterator[Holding]:
    holding = Holding()
    yield holding
    assert asyncio.all_tasks() == {asyncio.current_task()}, "a call is left"


async def test_cancelling_the_turn_cancels_all_calls_and_waits_for_them(holding: Holding) -> None:
    turn = asyncio.create_task(collect(runner(holding.tool), calls("tool", "tool")))
    await asyncio.wait_for(holding.begun.wait(), PATIENCE_SECONDS)
    turn.cancel()
    for _ in range(5):
        await asyncio.sleep(0)
    turn.cancel()  # a second time, as its turn does
    for _ in range(5):
        await asyncio.sleep(0)
    assert not turn.done()
    holding.may_let_go.set()
    with pytest.raises(asyncio.CancelledError):
        await turn
    assert holding.let_go == 2


async def test_closing_the_generator_cancels_all_calls_and_waits_for_them(holding: Holding) -> None:
    async def quick() -> None:
        await holding.begun.wait()

    holding.may_let_go.set()
    async with aclosing(runner(holding.tool, quick).run(TURN, calls("tool", "quick"))) as events:
        async for event in events:
            if isinstance(event, ToolResult):
                break
    assert holding.let_go == 1


async def test_a_cancel_while_calls_let_go_is_heard_when_they_have(holding: Holding) -> None:
    events = runner(holding.tool).run(TURN, calls("tool"))
    assert isinstance(await anext(events), ToolCall)
    assert await anext(events) == TextDelta("")
    waiting = asyncio.ensure_future(anext(events))
    await asyncio.wait_for(holding.begun.wait(), PATIENCE_SECONDS)
    waiting.cancel()
    for _ in range(5):
        await asyncio.sleep(0)
    waiting.cancel("again")
    for _ in range(5):
        await asyncio.sleep(0)
    holding.may_let_go.set()
    with pytest.raises(asyncio.CancelledError, match="again"):
        await waiting
    assert holding.let_go == 1


async def test_cancelling_the_turn_does_not_wait_for_a_thread() -> None:
    with gate() as opened:
        begun = asyncio.Event()
        loop = asyncio.get_running_loop()

        def tool() -> None:
            loop.call_soon_threadsafe(begun.set)
            opened.wait(PATIENCE_SECONDS)

        turn = asyncio.create_task(collect(runner(tool), calls("tool")))
        await asyncio.wait_for(begun.wait(), PATIENCE_SECONDS)
        turn.cancel()
        with pytest.raises(asyncio.CancelledError):
            await turn
        assert not opened.is_set()


async def test_a_thread_that_ends_after_its_loop_is_no_error() -> None:
    """A node that has stopped; a warning of the thread would fail this test."""
    with gate() as opened:
        begun = threading.Event()
        threads: list[threading.Thread] = []

        def tool() -> None:
            threads.append(threading.current_thread())
            begun.set()
            opened.wait(PATIENCE_SECONDS)

        async def node() -> None:
            turn = asyncio.create_task(collect(runner(tool), calls("tool")))
            await asyncio.to_thread(begun.wait, PATIENCE_SECONDS)
            turn.cancel()
            await asyncio.wait((turn,))

        await asyncio.to_thread(asyncio.run, node())
        opened.set()
        await asyncio.to_thread(threads[0].join, PATIENCE_SECONDS)
        assert not threads[0].is_alive()
