"""What clients are sent: the journal's events as frames, merged and numbered; messages and snapshots from rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, cast
from uuid import UUID

import asyncpg
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anynode.models.conversations import Snapshot
from anynode.models.events import Event, delta_payload
from anynode.server.errors import DatabaseUnavailable, NotFound
from anynode.server.protocol.encoding import (
    encode,
    error_frame,
    event_frames,
    message_of,
    numbered_frames,
    snapshot_frame,
    tool_calls_of,
    usage_of,
)
from anynode.server.protocol.frames import (
    JOURNAL_FRAMES,
    AnyServerFrame,
    CalledFunction,
    CallOfTool,
    ConversationSnapshot,
    Error,
    ErrorDetail,
    Message,
    MessageCreated,
    RunningTurn,
    ServerFrame,
    TurnCompleted,
    TurnDelta,
    TurnStarted,
    Usage,
)

CONVERSATION = UUID("018f0000-0000-7000-8000-000000000001")
TURN = UUID("018f0000-0000-7000-8000-000000000002")
OTHER_TURN = UUID("018f0000-0000-7000-8000-000000000003")
CREATED_AT = datetime(2024, 5, 6, 7, 8, 9, 10, tzinfo=UTC)
MESSAGE = Message(UUID(int=4), "assistant", "hé", None, None, None, "completed", TURN, CREATED_AT)

# What the journal shows.


def event(seq: int, type: str, payload: object, turn_id: UUID | None = TURN) -> Event:
    return Event(seq, type, None if turn_id is None else str(turn_id), encode(payload))


def delta(seq: int, text: str, turn_id: UUID = TURN) -> Event:
    return Event(seq, "turn.delta", str(turn_id), delta_payload(text))


def message() -> dict[str, Any]:
    built: dict[str, Any] = msgspec.to_builtins(MESSAGE)
    return built


EVENTS = [
    event(1, "message.created", {"message": message()}),
    event(2, "turn.started", {"message_id": "m"}),
    delta(3, 'one "\n\u2028 é'),
    event(4, "turn.tool_call", {"tool_call_id": "c", "tool_name": "add", "arguments": {"a": [1, {"b": None}]}}),
    event(5, "turn.tool_result", {"tool_call_id": "c", "tool_name": "add", "content": "2", "is_error": False}),
    event(6, "turn.restarted", {"epoch": 2, "text": ""}),
    event(7, "turn.completed", {"message": message(), "usage": msgspec.to_builtins(Usage(1, 2, None, 0.5))}),
    event(8, "turn.completed", {"message": message(), "usage": msgspec.to_builtins(Usage(None, None, None, 0.5))}),
    event(9, "turn.cancelled", {"message": message()}),
    event(
        10, "turn.failed", {"message": message(), "error": msgspec.to_builtins(ErrorDetail("agent_failed", "x", True))}
    ),
]


def strictly(text: str) -> ServerFrame:
    """The frame in `text`, which must have every field of its type and no other."""
    decoded: ServerFrame = msgspec.json.decode(text, type=AnyServerFrame)
    assert json.loads(text) == json.loads(encode(decoded))
    assert "\n" not in text
    return decoded


@pytest.mark.parametrize("shown", EVENTS, ids=lambda shown: f"{shown.seq} {shown.type}")
def test_a_single_event_is_shown_as_the_frame_of_its_type(shown: Event) -> None:
    (text,) = event_frames(CONVERSATION, [shown])
    decoded = strictly(text)
    assert isinstance(decoded, JOURNAL_FRAMES)
    assert json.loads(text)["type"] == shown.type
    assert (decoded.conversation_id, decoded.seq) == (CONVERSATION, shown.seq)
    assert getattr(decoded, "turn_id", TURN) == TURN


def test_the_examples_above_have_every_frame_of_the_journal() -> None:
    shown = {type(strictly(event_frames(CONVERSATION, [example])[0])) for example in EVENTS}
    assert shown == set(JOURNAL_FRAMES)


def test_events_of_several_kinds_are_shown_one_by_one() -> None:
    decoded = [strictly(text) for text in event_frames(CONVERSATION, EVENTS)]
    assert [getattr(each, "seq", None) for each in decoded] == [each.seq for each in EVENTS]
    assert isinstance(decoded[0], MessageCreated)
    assert decoded[0].message == MESSAGE
    assert isinstance(decoded[1], TurnStarted)
    assert isinstance(decoded[6], TurnCompleted)
    assert decoded[6].usage == Usage(1, 2, None, 0.5)


def test_an_event_shown_again_is_the_same_text() -> None:
    shown = delta(3, "again")
    assert event_frames(CONVERSATION, [shown]) == event_frames(CONVERSATION, [shown])


def test_adjacent_deltas_are_merged_under_the_last_seq() -> None:
    texts = event_frames(CONVERSATION, [delta(3, "a "), delta(4, '"\\'), delta(5, " é\U0001f600")])
    assert [strictly(text) for text in texts] == [TurnDelta(CONVERSATION, 5, TURN, 'a "\\ é\U0001f600')]


def test_merging_leaves_each_event_as_it_is_for_the_next_follower() -> None:
    events = [delta(3, "a"), delta(4, "b")]
    event_frames(CONVERSATION, events)
    assert strictly(event_frames(CONVERSATION, events[1:])[0]) == TurnDelta(CONVERSATION, 4, TURN, "b")


@pytest.mark.parametrize(
    "between",
    [
        event(5, "turn.restarted", {"epoch": 2, "text": ""}),
        event(5, "turn.tool_call", {"tool_call_id": "c", "tool_name": "t", "arguments": {}}),
    ],
    ids=lambda between: between.type,
)
def test_merging_does_not_cross_another_event(between: Event) -> None:
    events = [delta(3, "a"), delta(4, "b"), between, delta(6, "c"), delta(7, "d")]
    decoded = [strictly(text) for text in event_frames(CONVERSATION, events)]
    assert decoded[0] == TurnDelta(CONVERSATION, 4, TURN, "ab")
    assert decoded[2] == TurnDelta(CONVERSATION, 7, TURN, "cd")
    assert len(decoded) == 3


def test_merging_does_not_cross_into_another_turn() -> None:
    events = [delta(3, "a"), delta(4, "b"), delta(5, "c", OTHER_TURN), delta(6, "d", OTHER_TURN)]
    assert [strictly(text) for text in event_frames(CONVERSATION, events)] == [
        TurnDelta(CONVERSATION, 4, TURN, "ab"),
        TurnDelta(CONVERSATION, 6, OTHER_TURN, "cd"),
    ]


def test_no_events_are_no_frames() -> None:
    assert event_frames(CONVERSATION, []) == []


KINDS = st.sampled_from(["turn.delta", "turn.delta", "turn.delta", "turn.restarted", "turn.started"])


def _transcript(frames: Sequence[ServerFrame]) -> list[tuple[UUID | None, str]]:
    """Everything that frames say, one character an entry, so that merging makes no difference."""
    said: list[tuple[UUID | None, str]] = []
    for each in frames:
        if isinstance(each, TurnDelta):
            said += [(each.turn_id, character) for character in each.text]
        else:
            said.append((None, type(each).__name__))
    return said


@given(st.lists(st.tuples(KINDS, st.sampled_from([TURN, OTHER_TURN]), st.text(max_size=3)), max_size=12))
def test_merged_frames_say_what_single_ones_say(kinds: list[tuple[str, UUID, str]]) -> None:
    payloads: dict[str, object] = {"turn.restarted": {"epoch": 2, "text": ""}, "turn.started": {"message_id": "m"}}
    events = [
        delta(seq, text, turn_id) if type == "turn.delta" else event(seq, type, payloads[type], turn_id)
        for seq, (type, turn_id, text) in enumerate(kinds, 1)
    ]
    merged = [strictly(text) for text in event_frames(CONVERSATION, events)]
    single = [strictly(text) for each in events for text in event_frames(CONVERSATION, [each])]
    assert _transcript(merged) == _transcript(single)
    seqs = [getattr(each, "seq", 0) for each in merged]
    assert seqs == sorted(set(seqs))
    assert seqs[-1:] == [each.seq for each in events][-1:]


def test_each_frame_is_numbered_with_the_last_seq_that_it_holds() -> None:
    events = [delta(3, "a"), delta(4, "b"), event(5, "turn.restarted", {"epoch": 2, "text": ""}), delta(6, "c")]
    numbered = numbered_frames(CONVERSATION, events)
    assert [seq for seq, _ in numbered] == [4, 5, 6]
    assert [frame for _, frame in numbered] == event_frames(CONVERSATION, events)
    assert [json.loads(frame)["seq"] for _, frame in numbered] == [4, 5, 6]


def test_a_single_event_is_numbered_too() -> None:
    assert numbered_frames(CONVERSATION, [delta(3, "a")]) == [(3, event_frames(CONVERSATION, [delta(3, "a")])[0])]


def test_the_frame_of_an_event_is_made_once_for_all_followers() -> None:
    shown = delta(3, "a")
    (frame,) = event_frames(CONVERSATION, [shown])
    assert shown.frame is frame
    assert event_frames(CONVERSATION, [shown])[0] is frame
    assert dict(numbered_frames(CONVERSATION, [shown, event(4, "turn.started", {"message_id": "m"})]))[3] is frame


def test_a_conversations_id_may_be_given_as_text() -> None:
    events = [delta(3, "a"), delta(4, "b")]
    assert event_frames(str(CONVERSATION), events) == event_frames(CONVERSATION, events)


# What does not come from the journal.


def test_an_error_frame_says_which_request_and_conversation() -> None:
    decoded = strictly(error_frame(NotFound(conversation_id=CONVERSATION), "r"))
    assert decoded == Error("not_found", "There is no such conversation.", False, "r", CONVERSATION)


def test_an_error_frame_leaves_out_what_it_does_not_know() -> None:
    text = error_frame(DatabaseUnavailable(), None)
    assert set(json.loads(text)) == {"type", "code", "message", "retryable"}
    assert json.loads(text)["retryable"] is True


ROW: dict[str, Any] = {
    "id": MESSAGE.id,
    "role": "assistant",
    "content": "hé",
    "tool_calls": None,
    "tool_name": None,
    "tool_call_id": None,
    "status": "completed",
    "turn_id": TURN,
    "created_at": CREATED_AT,
}
CALLS = '[{"id":"1","type":"function","function":{"name":"f","arguments":"{}"}}]'


def test_a_message_is_made_of_the_row_that_has_its_fields() -> None:
    assert message_of(ROW | {"position": 7}) == MESSAGE


def test_a_message_shows_its_calls_as_they_are_stored() -> None:
    shown = message_of(ROW | {"tool_calls": CALLS})
    assert json.loads(encode(shown))["tool_calls"] == json.loads(CALLS)
    assert msgspec.json.decode(encode(shown), type=Message).tool_calls == [
        CallOfTool("1", "function", CalledFunction("f", "{}"))
    ]


def test_a_message_of_a_tool_says_what_it_answers() -> None:
    shown = message_of(ROW | {"role": "tool", "tool_name": "f", "tool_call_id": "1"})
    assert (shown.role, shown.tool_name, shown.tool_call_id) == ("tool", "f", "1")


def test_a_snapshot_shows_messages_and_the_turn_that_runs() -> None:
    rows = cast(Sequence[asyncpg.Record], [ROW, ROW | {"id": UUID(int=5)}])
    shown = strictly(snapshot_frame(CONVERSATION, Snapshot(7, OTHER_TURN, "so far", rows)))
    messages = [MESSAGE, msgspec.structs.replace(MESSAGE, id=UUID(int=5))]
    assert shown == ConversationSnapshot(CONVERSATION, messages, RunningTurn(OTHER_TURN, "so far"), 7)


def test_a_snapshot_where_no_turn_runs_says_so() -> None:
    text = snapshot_frame(CONVERSATION, Snapshot(7, None, "", []))
    assert json.loads(text)["turn"] is None
    assert strictly(text) == ConversationSnapshot(CONVERSATION, [], None, 7)


def test_what_is_not_stored_is_none() -> None:
    assert (tool_calls_of(None), usage_of(None)) == (None, None)


def test_a_stored_usage_is_read() -> None:
    assert usage_of('{"input_tokens":1,"output_tokens":null,"model":"m","seconds":0.5}') == Usage(1, None, "m", 0.5)
