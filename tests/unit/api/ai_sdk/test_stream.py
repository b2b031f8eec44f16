"""One turn as the AI SDK's UI message stream: what is written of a turn that is read by a script."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.types import Message

from anynode.models.events import Event
from anynode.server.api.ai_sdk.stream import chunk_stream
from anynode.server.engine.turn_reader import TurnInterrupted
from anynode.server.errors import NotFound
from anynode.server.transport.http import BREAK_OFF
from tests.kit.asgi import WAIT_SECONDS_MAX, Peer, http_scope
from tests.kit.turns import (
    STARTED,
    TURN,
    ScriptedReader,
    called,
    ended,
    journal,
    node_with,
    request_of,
    restarted,
    result,
    said,
    turn_ref,
)

GONE: Message = {"type": "http.disconnect"}
DONE = "[DONE]"
START = ["start", "start-step"]
END = ["text-end", "finish-step", "finish", DONE]


async def streamed(reader: ScriptedReader, *, is_new: bool) -> tuple[Peer, bool]:
    """Return the client of a stream that is over, and whether its connection was broken off."""
    peer, broken_off = Peer(), asyncio.Event()

    def break_off() -> None:
        broken_off.set()
        peer.say(GONE)

    stream = chunk_stream(node_with(turns=reader), request_of(peer), turn_ref(), is_new=is_new, heartbeat_seconds=60.0)
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        await stream(http_scope("GET", "/", more={BREAK_OFF: break_off}), peer.receive, peer.send)
    return peer, broken_off.is_set()


def chunks(body: bytes) -> list[Any]:
    events = body.decode().split("\n\n")
    assert events.pop() == ""
    data = [event.removeprefix("data: ") for event in events]
    return [text if text == DONE else json.loads(text) for text in data]


def types(body: bytes) -> list[str]:
    return [chunk if chunk == DONE else chunk["type"] for chunk in chunks(body)]


def texts(body: bytes) -> list[str]:
    return [chunk["delta"] for chunk in chunks(body) if chunk != DONE and chunk["type"] == "text-delta"]


async def test_a_new_turn_is_shown_chunk_by_chunk_to_its_end() -> None:
    events = journal(STARTED, said("a "), said("b"), ended())
    reader = ScriptedReader(events[:2], events[2:3], events[3:])
    peer, is_broken_off = await streamed(reader, is_new=True)
    assert types(peer.body) == [*START, "text-start", "text-delta", "text-delta", *END]
    assert texts(peer.body) == ["a ", "b"]
    assert chunks(peer.body)[0] == {"type": "start", "messageId": str(TURN)}
    assert peer.headers["x-vercel-ai-ui-message-stream"] == "v1"
    assert peer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert (peer.is_whole, is_broken_off) == (True, False)
    assert reader.asked == [(turn_ref(), True, False)]
    assert [len(chunks(message["body"])) for message in peer.sent[1:5]] == [4, 1, 3, 1]  # as they were committed


async def test_what_was_said_before_comes_in_as_few_chunks_as_show_it() -> None:
    events = journal(STARTED, said("a "), said("b "), said("c "), said("d "), said("e"), ended())
    reader = ScriptedReader(events[:4], events[4:])
    peer, _ = await streamed(reader, is_new=False)
    assert texts(peer.body) == ["a b c ", "d ", "e"]
    assert types(peer.body)[-4:] == END
    assert reader.asked == [(turn_ref(), True, True)]


async def test_what_was_taken_back_before_is_not_shown() -> None:
    cut = (said("let me see"), called("1"), restarted(""), said("no: "))
    events = journal(STARTED, *cut, said("b"), ended())
    peer, is_broken_off = await streamed(ScriptedReader(events[:5], events[5:]), is_new=False)
    assert texts(peer.body) == ["no: ", "b"]
    assert "reset-step" not in types(peer.body)
    assert "tool-input-available" not in types(peer.body)
    assert (peer.is_whole, is_broken_off) == (True, False)


@pytest.mark.parametrize("is_new", [True, False])
async def test_a_stream_breaks_off_where_a_takeover_takes_back_what_it_has_shown(is_new: bool) -> None:
    events = journal(STARTED, said("a "), restarted(""), said("b"), ended())
    peer, is_broken_off = await streamed(ScriptedReader(events[:2], events[2:]), is_new=is_new)
    assert texts(peer.body) == ["a "]
    assert "reset-step" not in types(peer.body)
    assert DONE not in types(peer.body)
    assert (peer.is_whole, is_broken_off) == (False, True)


async def test_a_stream_goes_on_over_a_takeover_that_takes_nothing_back() -> None:
    events = journal(STARTED, said("a "), restarted("a "), said("b"), ended())
    peer, is_broken_off = await streamed(ScriptedReader(events[:2], events[2:]), is_new=True)
    assert texts(peer.body) == ["a ", "b"]
    assert (peer.is_whole, is_broken_off) == (True, False)


@pytest.mark.parametrize("error", [TurnInterrupted(), NotFound()])
@pytest.mark.parametrize("shown", [[], journal(STARTED, said("a"))])
async def test_a_stream_that_cannot_go_on_breaks_off_without_a_word(error: Exception, shown: Sequence[Event]) -> None:
    reader = ScriptedReader(*([shown] if shown else []), error)
    peer, is_broken_off = await streamed(reader, is_new=True)
    assert types(peer.body) == ([*START, "text-start", "text-delta"] if shown else [])
    assert (peer.is_whole, is_broken_off) == (False, True)
    assert reader.is_closed


async def test_a_batch_that_shows_nothing_writes_nothing() -> None:
    events = journal(STARTED, ("turn.later", {}), ended())
    peer, _ = await streamed(ScriptedReader(events[:1], events[1:2], events[2:]), is_new=True)
    assert types(peer.body) == [*START, "finish-step", "finish", DONE]
    assert all(message["body"] for message in peer.sent[1:-1])


@pytest.mark.parametrize(("status", "last"), [("cancelled", "abort"), ("failed", "error")])
async def test_a_turn_that_was_stopped_or_has_failed_is_shown_to_its_end(status: str, last: str) -> None:
    events = journal(STARTED, said("a"), called("1"), result("1"), ended(status))
    peer, is_broken_off = await streamed(ScriptedReader(events), is_new=True)
    assert types(peer.body)[-2:] == [last, DONE]
    assert (peer.is_whole, is_broken_off) == (True, False)
