"""The events of a turn as types: decoded from the journal, and made of a stored turn."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from anynode.models.events import Event
from anynode.server.agents.agent import ToolResult
from anynode.server.engine.turn_events import (
    TurnCalled,
    TurnCancelled,
    TurnCompleted,
    TurnDelta,
    TurnEnded,
    TurnFailed,
    TurnRestarted,
    TurnStarted,
    decode_event,
    events_of_stored,
    is_end,
)
from anynode.server.protocol.frames import CalledFunction, CallOfTool
from tests.kit.turns import (
    AT,
    ERROR,
    STARTED,
    TURN,
    USAGE,
    Entry,
    ended,
    message,
    restarted,
    result,
    said,
    stored_turn,
)


def decoded(entry: Entry) -> object:
    type, payload = entry
    return decode_event(type, json.dumps(payload))


def test_events_that_are_not_the_end_are_decoded() -> None:
    assert decoded(STARTED) == TurnStarted()
    assert decoded(said('ümläut ☕ " \n')) == TurnDelta('ümläut ☕ " \n')
    assert decoded(result("1", "no such page", is_error=True)) == ToolResult("1", "search", "no such page", True)
    assert decoded(restarted("a b ")) == TurnRestarted("a b ")


def test_a_call_keeps_its_arguments_as_the_journal_has_them() -> None:
    event = decode_event(
        "turn.tool_call", '{"arguments": {"b": 1e3, "a": [1]}, "tool_name": "search", "tool_call_id": "1"}'
    )
    assert isinstance(event, TurnCalled)
    assert (event.tool_call_id, event.tool_name, bytes(event.arguments)) == ("1", "search", b'{"b": 1e3, "a": [1]}')
    assert event.decoded_arguments() == {"a": [1], "b": 1000.0}


def test_arguments_that_are_no_object_are_noticed_when_they_are_decoded() -> None:
    event = decode_event("turn.tool_call", '{"arguments": [1], "tool_name": "search", "tool_call_id": "1"}')
    assert isinstance(event, TurnCalled)
    with pytest.raises(msgspec.ValidationError):
        event.decoded_arguments()


@pytest.mark.parametrize(
    ("status", "kind", "usage", "error"),
    [
        ("completed", TurnCompleted, USAGE, None),
        ("cancelled", TurnCancelled, None, None),
        ("failed", TurnFailed, None, ERROR),
    ],
)
def test_the_end_of_a_turn_says_how_it_ended(status: str, kind: type[TurnEnded], usage: Any, error: Any) -> None:
    event = decoded(ended(status))
    assert type(event) is kind
    assert (event.status, event.message.created_at, event.usage, event.error) == (status, AT, usage, error)


@pytest.mark.parametrize("type", ["turn.waiting", "message.created", "", "turn.delta "])
def test_a_type_that_this_version_does_not_know_is_none(type: str) -> None:
    assert decode_event(type, "not even JSON") is None


@pytest.mark.parametrize(
    ("type", "payload"),
    [
        ("turn.delta", "{}"),
        ("turn.delta", '{"text": 1}'),
        ("turn.delta", '{"text": "a"'),
        ("turn.started", "[]"),
        ("turn.tool_call", '{"tool_call_id": "1", "tool_name": "search"}'),
        ("turn.tool_result", '{"tool_call_id": "1", "tool_name": "search", "is_error": false}'),
        ("turn.restarted", "{}"),
        ("turn.completed", "{}"),
        ("turn.failed", '{"message": {}}'),
    ],
)
def test_a_payload_that_is_not_of_its_types_form_is_an_error(type: str, payload: str) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_event(type, payload)


@pytest.mark.parametrize(
    ("type", "expected"),
    [
        ("turn.completed", True),
        ("turn.cancelled", True),
        ("turn.failed", True),
        ("turn.started", False),
        ("turn.delta", False),
        ("turn.restarted", False),
        ("message.created", False),
    ],
)
def test_the_last_event_of_a_turn_is_known_by_its_type(type: str, expected: bool) -> None:
    assert is_end(Event(1, type, str(TURN), "{}")) is expected


# A stored turn.


def shown(turn_events: list[Event]) -> list[object]:
    assert [event.seq for event in turn_events] == list(range(len(turn_events)))
    assert {event.turn_id for event in turn_events} == {str(TURN)}
    return [decode_event(event.type, event.payload) for event in turn_events]


def test_a_stored_turn_is_shown_as_its_journal_was_with_one_delta_for_each_message() -> None:
    calls = [CallOfTool(id, "function", CalledFunction("search", f'{{"query": "{id}"}}')) for id in ("1", "2")]
    stored = stored_turn(
        "completed",
        message("let me see", calls=calls),
        message("found", "tool", tool_call_id="1"),
        message("no such page", "tool", "failed", tool_call_id="2"),
        message("it is ☕"),
    )
    events = shown(events_of_stored(stored))
    first, second = events[2:4]
    assert isinstance(first, TurnCalled)
    assert isinstance(second, TurnCalled)
    assert (first.tool_call_id, first.tool_name, first.decoded_arguments()) == ("1", "search", {"query": "1"})
    assert (second.tool_call_id, second.decoded_arguments()) == ("2", {"query": "2"})
    end = events.pop()
    assert events[:2] == [TurnStarted(), TurnDelta("let me see")]
    assert events[4:] == [
        ToolResult("1", "search", "found"),
        ToolResult("2", "search", "no such page", True),
        TurnDelta("it is ☕"),
    ]
    assert isinstance(end, TurnCompleted)
    assert (end.message.created_at, end.usage, end.error) == (AT, USAGE, None)


@pytest.mark.parametrize(
    ("status", "kind", "error"),
    [("completed", TurnCompleted, None), ("cancelled", TurnCancelled, None), ("failed", TurnFailed, ERROR)],
)
@pytest.mark.parametrize("messages", [[], [message("")]])
def test_a_stored_turn_without_a_text_has_a_start_and_its_end(
    status: str, kind: type[TurnEnded], error: Any, messages: list[Any]
) -> None:
    start, end = shown(events_of_stored(stored_turn(status, *messages)))
    assert start == TurnStarted()
    assert type(end) is kind
    assert (end.message.created_at, end.error) == (AT, error)


def test_a_stored_turn_that_runs_has_no_end() -> None:
    assert shown(events_of_stored(stored_turn("running"))) == [TurnStarted()]
