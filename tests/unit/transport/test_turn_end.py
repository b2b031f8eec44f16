"""The end of a turn, for clients that ask once and wait."""

from __future__ import annotations

import asyncio

import pytest

from anynode.server.engine.turn_reader import TurnInterrupted
from anynode.server.errors import AgentFailed, DatabaseUnavailable, Draining, NotFound
from anynode.server.protocol.frames import CalledFunction, CallOfTool
from anynode.server.transport import turn_end
from anynode.server.transport.turn_end import answer_of, wait_end, wait_stopped
from tests.kit.asgi import WAIT_SECONDS_MAX
from tests.kit.turns import CONVERSATION, TURN, USAGE, ScriptedReader, message, node_with, stored_turn, turn_ref


@pytest.fixture
def reader() -> ScriptedReader:
    return ScriptedReader()


# Waiting.


async def test_the_end_of_a_turn_is_waited_for(reader: ScriptedReader) -> None:
    waiting = asyncio.create_task(wait_end(node_with(turns=reader), turn_ref()))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not waiting.done()
    reader.ended.set()
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        await waiting


async def test_a_node_that_has_drained_first_says_that_the_turn_goes_on(
    reader: ScriptedReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turn_end, "LAST_WORDS_SECONDS", 0.001)
    node = node_with(turns=reader)
    node.drained.set()
    with pytest.raises(Draining, match="the turn goes on"):
        await wait_end(node, turn_ref())


async def test_the_end_that_a_drain_has_waited_for_counts(reader: ScriptedReader) -> None:
    node = node_with(turns=reader)
    node.drained.set()
    waiting = asyncio.create_task(wait_end(node, turn_ref()))
    for _ in range(5):
        await asyncio.sleep(0)
    reader.ended.set()
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        await waiting


async def test_a_conversation_that_is_deleted_meanwhile_is_not_found(reader: ScriptedReader) -> None:
    reader.wait_error = NotFound()
    for waiting in (wait_end, answer_of, wait_stopped):
        with pytest.raises(NotFound):
            await waiting(node_with(turns=reader), turn_ref())


# The answer.


async def test_the_answer_is_the_last_message_with_all_calls_of_the_turn(reader: ScriptedReader) -> None:
    first, second = (CallOfTool(id, "function", CalledFunction("search", "{}")) for id in "12")
    answer = message("hello")
    reader.stored_as = stored_turn(
        "completed",
        message("", calls=[first]),
        message("found", "tool", tool_call_id="1"),
        message("", calls=[second]),
        message("found", "tool", tool_call_id="2"),
        answer,
    )
    reader.ended.set()
    found = await answer_of(node_with(turns=reader), turn_ref())
    assert (found.conversation_id, found.turn_id) == (CONVERSATION, TURN)
    assert (found.response, found.message, found.usage) == ("hello", answer, USAGE)
    assert list(found.tool_calls) == [first, second]


async def test_the_answer_of_a_turn_that_was_stopped_is_what_was_said(reader: ScriptedReader) -> None:
    reader.stored_as = stored_turn("cancelled", message("hel", status="cancelled"))
    reader.ended.set()
    answer = await answer_of(node_with(turns=reader), turn_ref())
    assert (answer.response, answer.message.status) == ("hel", "cancelled")


async def test_a_turn_that_has_failed_raises_its_own_message(reader: ScriptedReader) -> None:
    reader.ended.set()
    reader.stored_as = stored_turn("failed", message("hel", status="failed"))
    with pytest.raises(AgentFailed, match=r"^The agent failed\.$"):
        await answer_of(node_with(turns=reader), turn_ref())


async def test_a_turn_that_runs_again_cannot_be_answered_from_here(reader: ScriptedReader) -> None:
    reader.ended.set()
    reader.stored_as = stored_turn("running")
    with pytest.raises(TurnInterrupted):
        await answer_of(node_with(turns=reader), turn_ref())


async def test_postgres_that_does_not_answer_is_said(reader: ScriptedReader) -> None:
    reader.ended.set()
    reader.stored_as = DatabaseUnavailable()
    with pytest.raises(DatabaseUnavailable):
        await answer_of(node_with(turns=reader), turn_ref())


# Stopped turns.


async def test_a_stopped_turn_is_waited_for_until_it_has_ended(reader: ScriptedReader) -> None:
    waiting = asyncio.create_task(wait_stopped(node_with(turns=reader), turn_ref()))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not waiting.done()
    reader.ended.set()
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        await waiting


async def test_a_stopped_turn_is_waited_for_no_longer_than_that(reader: ScriptedReader) -> None:
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        await wait_stopped(node_with(turns=reader), turn_ref(), within_seconds=0.001)
    assert not reader.ended.is_set()


async def test_a_stopped_turn_is_left_to_other_nodes_where_this_one_goes_down(
    reader: ScriptedReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turn_end, "LAST_WORDS_SECONDS", 0.001)
    node = node_with(turns=reader)
    node.drained.set()
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        await wait_stopped(node, turn_ref())
