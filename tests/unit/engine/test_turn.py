"""One running turn: what of its agent's events goes to the journal, which messages it leaves, and that it ends once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any, cast
from uuid import UUID

import pytest

from anynode.models.events import Ending
from anynode.models.ids import uuid7
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
from anynode.server.engine.journal import TurnJournal
from anynode.server.engine.steps import Step
from anynode.server.engine.turn import MODEL_CHARACTERS_MAX, TOKENS_MAX, YIELD_EVERY, Draft, Patience, TurnRunner

NOW = datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC)
CALL = ToolCall("1", "search", {"q": "x"})
OTHER_CALL = ToolCall("2", "search", {"q": "y"})
RESULT = ToolResult("1", "search", "found")
FAULT = ToolResult("2", "search", "broken", is_error=True)

Shape = list[tuple[int, str, str, str]]


def shape(draft_or_ending: Draft | Ending) -> Shape:
    """Each message's number, role, content and status."""
    return [(each.number, each.role, each.content, each.status) for each in draft_or_ending.messages]


# The answer so far.


def draft(bytes_max: int = 1000) -> Draft:
    """An answer that has not begun."""
    return Draft("user", bytes_max)


def test_an_answer_without_tools_is_one_message() -> None:
    answer = draft()
    answer.step.texts += ["one ", "two"]
    message = answer.finish("completed", NOW)
    assert shape(answer) == [(1, "assistant", "one two", "completed")]
    assert answer.messages == [message]
    assert (message.user_id, message.created_at, message.tool_calls) == ("user", NOW, None)


def test_a_completed_step_is_a_message_with_calls_and_one_for_each_result() -> None:
    answer = draft()
    answer.step = Step(["looking"], [CALL, OTHER_CALL], [FAULT, RESULT])
    answer.complete_step(NOW)
    answer.step.texts.append("done")
    answer.finish("completed", NOW)
    assert shape(answer) == [
        (1, "assistant", "looking", "completed"),
        (2, "tool", "broken", "failed"),
        (3, "tool", "found", "completed"),
        (4, "assistant", "done", "completed"),
    ]
    calls = json.loads(answer.messages[0].tool_calls or "")
    assert [(call["id"], call["function"]["name"]) for call in calls] == [("1", "search"), ("2", "search")]
    assert [(each.tool_name, each.tool_call_id) for each in answer.messages] == [
        (None, None),
        ("search", "2"),
        ("search", "1"),
        (None, None),
    ]


def test_a_step_that_is_cut_keeps_the_calls_that_have_results() -> None:
    answer = draft()
    answer.step = Step(["looking"], [CALL, OTHER_CALL], [RESULT])
    answer.finish("cancelled", NOW)
    assert shape(answer) == [
        (1, "assistant", "looking", "completed"),
        (2, "tool", "found", "completed"),
        (3, "assistant", "", "cancelled"),
    ]
    assert [call["id"] for call in json.loads(answer.messages[0].tool_calls or "")] == ["1"]


def test_a_step_that_is_cut_before_any_result_leaves_its_text_alone() -> None:
    answer = draft()
    answer.step = Step(["looking"], [CALL], [])
    answer.finish("failed", NOW)
    assert shape(answer) == [(1, "assistant", "looking", "failed")]
    assert answer.messages[0].tool_calls is None


def test_an_answer_goes_on_behind_what_earlier_attempts_left() -> None:
    answer = draft()
    answer.keep([Step(["one"], [CALL], [RESULT]), Step(["two"], [OTHER_CALL], [FAULT])], "thr", NOW)
    answer.step.texts.append("ee")
    answer.finish("completed", NOW)
    assert [content for _, _, content, _ in shape(answer)] == ["one", "found", "two", "broken", "three"]
    assert [number for number, *_ in shape(answer)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("text", "bytes"), [("", 0), ("abc", 3), ("\u00f6", 2), ("a\U0001f600", 5)])
def test_the_size_of_an_answer_is_in_bytes_of_utf_8(text: str, bytes: int) -> None:
    answer = draft()
    answer.count(text)
    assert answer.bytes == bytes


def test_what_earlier_attempts_left_counts() -> None:
    answer = draft()
    answer.keep([Step(["\u00f6ne"], [CALL], [RESULT, ToolResult("1", "s", "\u00f6")])], "two", NOW)
    assert answer.bytes == 4 + 5 + 2 + 3


def test_an_answer_may_be_as_long_as_its_limit() -> None:
    answer = draft(5)
    assert [answer.count("123"), answer.count("45"), answer.count("6")] == [True, True, False]


# Patience.


@pytest.mark.parametrize(
    ("heard_at", "now", "left"),
    [
        (100.0, 100.0, 5.0),
        (100.0, 104.0, 1.0),
        (100.0, 105.0, 0.0),
        (103.0, 105.0, 3.0),
        (128.0, 128.0, 2.0),  # of the 30 seconds for all of it
        (130.0, 130.0, 0.0),
    ],
)
def test_an_agent_has_its_time_from_when_it_was_heard_last_and_one_for_the_whole_answer(
    heard_at: float, now: float, left: float
) -> None:
    patience = Patience(5.0, 30.0, 100.0)
    patience.heard_at = heard_at
    assert patience.seconds_left(now) == left


# The turn.


class Written:
    """A turn's journal that keeps what is written, and commits the ending at once unless it `is_slow`."""

    def __init__(self, epoch: int = 1) -> None:
        self.epoch = epoch
        self.closed: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.said: list[Any] = []
        self.urgent: list[str] = []
        self.payload: Any = None
        self.ending: Ending | None = None
        self.is_slow = False
        self.commits = asyncio.Queue[asyncio.Future[None]]()

    def add_text(self, text: str, *, is_urgent: bool = False) -> None:
        self.said.append(text)
        if is_urgent:
            self.urgent.append(text)

    def add_event(self, type: str, payload: str) -> None:
        self.said.append((type, json.loads(payload)))

    def end(self, type: str, payload: str, ending: Ending) -> None:
        assert self.ending is None, "only the first end counts, and the turn knows it"
        self.said.append(type)
        self.payload, self.ending = json.loads(payload), ending
        if not self.is_slow:
            self.closed.set_result(True)

    def lose(self) -> None:
        if not self.closed.done():
            self.closed.set_result(False)

    async def wait_committed(self) -> None:
        committed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        await self.commits.put(committed)
        await committed


def runner(
    agent: Callable[[Turn], AsyncIterator[Any]],
    written: Written,
    *,
    bytes_max: int = 1000,
    seconds_max: float = 3600.0,
    turn_id: UUID | None = None,
) -> TurnRunner:
    """A turn that has not begun."""
    turn = Turn(turn_id or uuid7(), UUID(int=1), "user", [], attempt=written.epoch)
    journal = cast(TurnJournal, written)
    return TurnRunner(
        cast(Agent, agent),
        turn,
        journal,
        timeout_seconds=60.0,
        seconds_max=seconds_max,
        answer_bytes_max=bytes_max,
    )


def saying(*events: AgentEvent | str) -> Callable[[Turn], AsyncIterator[AgentEvent]]:
    """An agent that yields these, and ends."""

    async def agent(turn: Turn) -> AsyncIterator[AgentEvent]:
        for event in events:
            yield TextDelta(event) if isinstance(event, str) else event

    return agent


async def ran(agent: Callable[[Turn], AsyncIterator[Any]], **options: Any) -> Written:
    """What a turn of this agent has written, once it is over."""
    written = Written()
    assert await runner(agent, written, **options).run()
    return written


async def test_an_agents_text_is_written_as_it_comes_and_the_first_is_urgent() -> None:
    written = await ran(saying("one ", "", "two"))
    assert written.said == ["one ", "two", "turn.completed"]
    assert written.urgent == ["one "]
    assert written.ending is not None
    assert (written.ending.status, shape(written.ending)) == ("completed", [(1, "assistant", "one two", "completed")])
    assert written.payload["message"]["content"] == "one two"
    assert written.payload["message"]["id"] == str(written.ending.messages[-1].id)


async def test_an_agent_is_heard_on_behind_its_calls_only_once_they_are_committed() -> None:
    heard: list[str] = []

    async def agent(turn: Turn) -> AsyncIterator[AgentEvent]:
        yield CALL
        yield OTHER_CALL
        heard.append("calls")
        yield TextDelta("")
        heard.append("committed")
        yield RESULT
        yield FAULT

    written = Written()
    running = asyncio.create_task(runner(agent, written).run())
    committed = await written.commits.get()
    assert heard == ["calls"]
    assert [type for type, _ in written.said] == ["turn.tool_call", "turn.tool_call"]
    committed.set_result(None)
    assert await running
    assert heard == ["calls", "committed"]
    assert written.commits.empty()
    assert [said[1] for said in written.said[2:4]] == [
        {"tool_call_id": "1", "tool_name": "search", "content": "found", "is_error": False},
        {"tool_call_id": "2", "tool_name": "search", "content": "broken", "is_error": True},
    ]


@pytest.mark.parametrize("after", [TextDelta("more"), ToolCall("2", "search", {}), StepEnd()])
async def test_what_comes_after_the_results_of_a_step_is_another_step(after: AgentEvent) -> None:
    written = Written()
    running = asyncio.create_task(runner(saying("look", CALL, RESULT, after), written).run())
    for _ in range(1 + isinstance(after, ToolCall)):
        waiting = asyncio.create_task(written.commits.get())
        await asyncio.wait((waiting, running), return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            waiting.result().set_result(None)
        else:
            waiting.cancel()
    assert await running
    assert written.ending is not None
    assert shape(written.ending)[:2] == [(1, "assistant", "look", "completed"), (2, "tool", "found", "completed")]
    assert shape(written.ending)[2:] == [(3, "assistant", "more" if after == TextDelta("more") else "", "completed")]


async def test_usage_adds_up_and_is_told_with_the_end() -> None:
    written = await ran(saying(Usage(1, 2, "one"), "said", Usage(3, 4), Usage(0, 0, "two")))
    usage = written.payload["usage"]
    assert written.ending is not None
    assert json.loads(written.ending.usage or "") == usage
    assert usage.pop("seconds") >= 0
    assert usage == {"input_tokens": 4, "output_tokens": 6, "model": "two"}


@pytest.mark.parametrize(
    ("told", "counted"),
    [
        (-5, 0),
        (True, 0),
        (1.5, 0),
        (float("nan"), 0),
        (float("inf"), 0),
        ("7", 0),
        (None, 0),
        (10**23, TOKENS_MAX),
        (TOKENS_MAX, TOKENS_MAX),
    ],
)
async def test_numbers_of_tokens_that_cannot_be_are_clamped(told: Any, counted: int) -> None:
    usage = (await ran(saying(Usage(told, told, "m")))).payload["usage"]
    assert [usage["input_tokens"], usage["output_tokens"], usage["model"]] == [counted, counted, "m"]


async def test_tokens_add_up_to_no_more_than_readers_of_json_take() -> None:
    usage = (await ran(saying(Usage(TOKENS_MAX, 1), Usage(1, 1), Usage(-1, -1)))).payload["usage"]
    assert [usage["input_tokens"], usage["output_tokens"]] == [TOKENS_MAX, 2]


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        ("m" * 100_000, "m" * MODEL_CHARACTERS_MAX),
        ("a\x1b]0;title\x07b\n\x9bc\u202ed", "a]0;titlebcd"),
        ("\0\ud83d", None),
        (7, None),
    ],
)
async def test_the_name_of_a_model_is_short_and_printable(told: Any, kept: str | None) -> None:
    assert (await ran(saying(Usage(1, 1, told)))).payload["usage"]["model"] == kept


async def test_an_agent_that_tells_no_usage_has_none() -> None:
    usage = (await ran(saying("said"))).payload["usage"]
    assert [usage[name] for name in ("input_tokens", "output_tokens", "model")] == [None, None, None]


async def test_a_turn_that_was_taken_over_took_as_long_as_its_id_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = UUID(int=(1_000_000 << 80) | (7 << 76) | (2 << 62))  # 1000 s after the epoch of Unix
    monkeypatch.setattr("anynode.server.engine.turn.time.time", lambda: 1042.5)
    written = Written(epoch=2)
    assert await runner(saying("said"), written, turn_id=begun).run()
    assert written.payload["usage"]["seconds"] == 42.5


async def test_an_error_of_the_agent_is_told_as_it_says_it() -> None:
    async def agent(turn: Turn) -> AsyncIterator[AgentEvent]:
        yield TextDelta("said")
        raise AgentError("no\0 more", retryable=True)

    written = await ran(agent)
    assert written.said == ["said", "turn.failed"]
    assert written.payload["error"] == {"code": "agent_failed", "message": "no\ufffd more", "retryable": True}
    assert "usage" not in written.payload
    assert written.ending is not None
    assert shape(written.ending) == [(1, "assistant", "said", "failed")]
    assert json.loads(written.ending.error or "") == written.payload["error"]


async def test_an_exception_of_the_agent_is_told_by_its_kind_alone() -> None:
    async def agent(turn: Turn) -> AsyncIterator[AgentEvent]:
        yield TextDelta("said")
        raise ValueError("a secret")

    error = (await ran(agent)).payload["error"]
    assert "ValueError" in error["message"]
    assert "secret" not in error["message"]
    assert not error["retryable"]


async def test_an_agent_that_cancels_itself_has_been_interrupted() -> None:
    async def agent(turn: Turn) -> AsyncIterator[AgentEvent]:
        yield TextDelta("said")
        raise asyncio.CancelledError

    assert (await ran(agent)).payload["error"]["retryable"]


@pytest.mark.parametrize(
    "wrong", [ToolResult("9", "search", "found"), ToolCall("1", "search", {}), ToolCall("3", cast(str, 7), {})]
)
async def test_calls_and_results_that_do_not_fit_fail_the_turn(wrong: AgentEvent) -> None:
    written = await ran(saying(CALL, wrong))
    assert written.said[-1] == "turn.failed"
    assert [said[0] for said in written.said[:-1]] == ["turn.tool_call"]


@pytest.mark.parametrize(
    ("events", "bytes_max", "said"),
    [
        (["12345", "6"], 5, ["12345"]),
        (["\u00f6\u00f6", "\u00f6"], 5, ["\u00f6\u00f6"]),
        ([CALL, "more"], 10, []),
        (["12345", "\ud83d"], 7, ["12345"]),  # half a pair, which becomes a character of three bytes at the end
    ],
)
async def test_an_answer_that_is_too_long_fails_with_what_fitted(
    events: list[AgentEvent | str], bytes_max: int, said: list[str]
) -> None:
    written = await ran(saying(*events), bytes_max=bytes_max)
    assert written.said == [*said, "turn.failed"]
    assert f"longer than {bytes_max} bytes" in written.payload["error"]["message"]


async def test_a_result_that_is_too_long_fails_the_turn() -> None:
    written = Written()
    running = asyncio.create_task(
        runner(saying(CALL, ToolResult("1", "search", "x" * 100)), written, bytes_max=100).run()
    )
    (await written.commits.get()).set_result(None)
    assert await running
    assert [said if isinstance(said, str) else said[0] for said in written.said] == ["turn.tool_call", "turn.failed"]


async def test_text_is_made_storable_also_over_two_chunks() -> None:
    written = await ran(saying("a\0b", "\ud83d", "\ude00", "\ud83d"))
    assert written.said == ["a\ufffdb", "\U0001f600", "\ufffd", "turn.completed"]


async def test_calls_are_made_storable() -> None:
    written = Written()
    running = asyncio.create_task(runner(saying(ToolCall("1", "s", {"q": "a\0"}), ""), written).run())
    (await written.commits.get()).set_result(None)
    assert await running
    assert written.said[0][1]["arguments"] == {"q": "a\ufffd"}


class Held:
    """An agent that says something, and then waits until it is told to go on."""

    def __init__(self) -> None:
        self.has_begun = asyncio.Event()
        self.may_go_on = asyncio.Event()
        self.is_closed = False

    async def __call__(self, turn: Turn) -> AsyncIterator[AgentEvent]:
        try:
            yield TextDelta("said")
            self.has_begun.set()
            await self.may_go_on.wait()
            yield TextDelta(" more")
        finally:
            self.is_closed = True


@pytest.fixture
async def held() -> Held:
    """An agent that waits."""
    return Held()


async def test_a_cancel_ends_the_turn_with_what_was_said(held: Held) -> None:
    written = Written()
    turn = runner(held, written)
    running = asyncio.create_task(turn.run())
    await held.has_begun.wait()
    turn.cancel()
    assert await running
    assert written.said == ["said", "turn.cancelled"]
    assert written.ending is not None
    assert shape(written.ending) == [(1, "assistant", "said", "cancelled")]
    assert "error" not in written.payload
    assert held.is_closed


async def test_only_the_first_end_counts(held: Held) -> None:
    written = Written()
    turn = runner(held, written)
    running = asyncio.create_task(turn.run())
    await held.has_begun.wait()
    turn.fail("first")
    turn.cancel()
    turn.fail("third")
    assert await running
    assert written.payload["error"]["message"] == "first"


async def test_what_an_agent_says_behind_the_end_is_not_heard() -> None:
    written = Written()

    async def agent(turn: Turn) -> AsyncIterator[AgentEvent]:
        yield TextDelta("said")
        running_turn.cancel()
        yield TextDelta(" more")
        raise AssertionError("an agent is not asked for more behind the end")

    running_turn = runner(agent, written)
    assert await running_turn.run()
    assert written.said == ["said", "turn.cancelled"]


async def test_a_turn_is_over_only_once_its_end_is_committed() -> None:
    written = Written()
    written.is_slow = True
    has_ended = asyncio.Event()

    async def agent(turn: Turn) -> AsyncIterator[AgentEvent]:
        yield TextDelta("said")
        has_ended.set()

    running = asyncio.create_task(runner(agent, written).run())
    await has_ended.wait()
    await asyncio.wait((running,), timeout=0)
    assert not running.done()
    written.closed.set_result(True)
    assert await running


async def test_a_turn_that_is_lost_stops_its_agent_and_has_no_end(held: Held) -> None:
    written = Written()
    turn = runner(held, written)
    running = asyncio.create_task(turn.run())
    await held.has_begun.wait()
    turn.lose()
    assert not await running
    assert written.said == ["said"]
    assert held.is_closed


async def test_a_turn_that_has_ended_before_it_began_asks_no_agent() -> None:
    asked: list[Turn] = []

    async def agent(turn: Turn) -> AsyncIterator[AgentEvent]:
        asked.append(turn)
        yield TextDelta("said")

    written = Written()
    turn = runner(agent, written)
    turn.keep([Step(["one"], [CALL], [RESULT])], "two")
    turn.cancel()
    assert await turn.run()
    assert asked == []
    assert written.ending is not None
    assert [content for _, _, content, _ in shape(written.ending)] == ["one", "found", "two"]


async def test_a_turn_goes_on_behind_what_earlier_attempts_left() -> None:
    written = Written(epoch=2)
    turn = runner(saying(" more"), written)
    turn.keep([Step(["one"], [CALL], [RESULT])], "two")
    assert await turn.run()
    assert written.said == [" more", "turn.completed"]
    assert written.ending is not None
    assert [content for _, _, content, _ in shape(written.ending)] == ["one", "found", "two more"]


class Clock:
    """The time of the loop, moved by hand, and the checks that are due at some time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.pauses: list[float] = []
        self._check: Callable[[], None] | None = None
        self._loop = asyncio.get_running_loop()
        monkeypatch.setattr(self._loop, "time", lambda: self.now)
        monkeypatch.setattr(self._loop, "call_later", self._call_later)

    def _call_later(self, seconds: float, check: Callable[[], None]) -> asyncio.TimerHandle:
        self.pauses.append(seconds)
        self._check = check
        return asyncio.TimerHandle(0.0, check, (), self._loop)

    def pass_and_check(self, seconds: float) -> None:
        """Let time pass, and do the newest check."""
        self.now += seconds
        assert self._check is not None
        self._check()


async def test_an_agent_that_says_nothing_for_too_long_fails(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    written = Written()
    clock.now += 10.0
    running = asyncio.create_task(runner(held, written).run())
    await held.has_begun.wait()
    clock.pass_and_check(40.0)
    assert clock.pauses == [60.0, 20.0]
    assert written.ending is None
    clock.pass_and_check(20.0)
    monkeypatch.undo()
    assert await running
    assert written.payload["error"]["retryable"]
    assert "60 seconds" in written.payload["error"]["message"]


async def test_an_agent_that_never_ends_fails_in_the_end_and_what_it_said_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    written = Written()
    heard = asyncio.Queue[None]()
    more = asyncio.Queue[None]()

    async def agent(turn: Turn) -> AsyncIterator[AgentEvent]:
        yield TextDelta("said")
        while True:
            heard.put_nowait(None)
            await more.get()
            yield TextDelta("")  # which is progress, as of a model that thinks

    running = asyncio.create_task(runner(agent, written, seconds_max=150.0).run())
    await heard.get()
    for _ in range(2):
        clock.pass_and_check(59.0)
        more.put_nowait(None)
        await heard.get()
        assert written.ending is None
    clock.pass_and_check(31.0)
    assert clock.pauses == [60.0, 1.0, 1.0, 1.0]
    assert written.ending is None
    clock.pass_and_check(1.0)
    monkeypatch.undo()
    assert await running
    assert written.said == ["said", "turn.failed"]
    assert written.payload["error"] == {
        "code": "agent_failed",
        "message": "The answer took longer than 150 seconds (TURN_SECONDS_MAX).",
        "retryable": False,
    }
    assert written.ending is not None
    assert shape(written.ending) == [(1, "assistant", "said", "failed")]


async def test_an_agent_that_never_waits_lets_the_others_run() -> None:
    heard: list[int] = []
    has_begun = asyncio.Event()

    async def agent(turn: Turn) -> AsyncIterator[AgentEvent]:
        has_begun.set()
        for number in range(3 * YIELD_EVERY):
            heard.append(number)
            yield TextDelta("x")

    running = asyncio.create_task(ran(agent))
    await has_begun.wait()
    assert len(heard) <= YIELD_EVERY
    await running
    assert len(heard) == 3 * YIELD_EVERY
