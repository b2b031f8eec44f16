"""One turn as a stream of the OpenAI Responses API: what is written of a turn that is read by a script."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.types import Message

from anynode.models.events import Event
from anynode.server.api.openai import stream as module
from anynode.server.api.openai.stream import response_stream
from anynode.server.engine.turn_reader import TurnInterrupted
from anynode.server.errors import DatabaseUnavailable, NotFound
from anynode.server.transport.http import BREAK_OFF
from tests.kit.asgi import WAIT_SECONDS_MAX, Peer, http_scope
from tests.kit.turns import STARTED, TURN, ScriptedReader, ended, journal, node_with, request_of, said, turn_ref

GONE: Message = {"type": "http.disconnect"}
WHOLE = journal(STARTED, said("a "), said("b"), ended())
TYPES = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
]


async def streamed(reader: ScriptedReader, after: int | None = None) -> tuple[Peer, bool]:
    """Return the client of a stream that is over, and whether its connection was broken off."""
    peer, broken_off = Peer(), asyncio.Event()

    def break_off() -> None:
        broken_off.set()
        peer.say(GONE)

    stream = response_stream(
        node_with(turns=reader), request_of(peer), turn_ref(), after, "echo", heartbeat_seconds=60.0
    )
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        await stream(http_scope("GET", "/", more={BREAK_OFF: break_off}), peer.receive, peer.send)
    return peer, broken_off.is_set()


def events_of(body: bytes) -> list[dict[str, Any]]:
    """The events of a stream, each of which is named as its type says."""
    shown = []
    parts = body.decode().split("\n\n")
    assert parts.pop() == ""
    for part in parts:
        name, data = part.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        shown.append(event)
    return shown


async def test_a_turn_is_shown_from_its_start_to_its_end() -> None:
    reader = ScriptedReader(WHOLE[:2], WHOLE[2:])
    peer, is_broken_off = await streamed(reader)
    shown = events_of(peer.body)
    assert [event["type"] for event in shown] == TYPES
    assert [event["sequence_number"] for event in shown] == list(range(10))
    assert shown[-1]["response"]["id"] == f"resp_{TURN.hex}"
    assert (peer.is_whole, is_broken_off) == (True, False)
    assert reader.asked == [(turn_ref(), True, False)]
    assert [len(events_of(message["body"])) for message in peer.sent[1:3]] == [5, 5]  # as they were committed


@pytest.mark.parametrize("after", [0, 3, 4, 8])
async def test_a_stream_goes_on_after_a_sequence_number_with_the_same_events(after: int) -> None:
    whole = events_of((await streamed(ScriptedReader(WHOLE)))[0].body)
    reader = ScriptedReader(WHOLE[:2], WHOLE[2:])
    peer, _ = await streamed(reader, after)
    assert events_of(peer.body) == whole[after + 1 :]
    assert reader.asked == [(turn_ref(), False, False)]


async def test_nothing_comes_after_the_last_sequence_number() -> None:
    peer, is_broken_off = await streamed(ScriptedReader(WHOLE), 9)
    assert (peer.body, peer.is_whole, is_broken_off) == (b"", True, False)


async def test_others_go_on_while_there_is_much_to_catch_up_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVENTS_AT_ONCE", 2)
    events = journal(STARTED, *(said(f"{number}") for number in range(6)), ended())
    peer, _ = await streamed(ScriptedReader(events))
    pieces = [events_of(message["body"]) for message in peer.sent[1:-1]]
    assert [sum(event["type"] == "response.output_text.delta" for event in piece) for piece in pieces] == [1, 2, 2, 1]
    assert [event["sequence_number"] for piece in pieces for event in piece] == list(range(14))


@pytest.mark.parametrize("error", [TurnInterrupted(), DatabaseUnavailable()])
@pytest.mark.parametrize("shown", [[], WHOLE[:2]])
async def test_what_another_request_may_show_breaks_off_without_a_word(
    error: Exception, shown: Sequence[Event], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        peer, is_broken_off = await streamed(ScriptedReader(*([shown] if shown else []), error))
    assert len(events_of(peer.body)) == (5 if shown else 0)
    assert (peer.is_whole, is_broken_off) == (False, True)
    assert [record.getMessage() for record in caplog.records] == [f"response resp_{TURN.hex} cannot be shown: {error}"]


@pytest.mark.parametrize(("error", "code"), [(NotFound(), "not_found"), (KeyError("broken"), "internal_error")])
@pytest.mark.parametrize(
    ("shown", "after", "number"), [([], None, 0), (WHOLE[:2], None, 5), (WHOLE[:2], 3, 5), (WHOLE[:2], 8, 9)]
)
async def test_other_errors_are_the_last_event_with_the_next_sequence_number(
    error: Exception,
    code: str,
    shown: Sequence[Event],
    after: int | None,
    number: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.CRITICAL):
        peer, is_broken_off = await streamed(ScriptedReader(*([shown] if shown else []), error), after)
    *_, last = events_of(peer.body)
    assert (last["type"], last["code"], last["sequence_number"]) == ("error", code, number)
    assert set(last) == {"type", "code", "message", "param", "sequence_number"}
    assert (peer.is_whole, is_broken_off) == (False, True)
