"""The AI SDK's chunks: a fold over a turn's journal after which a client shows what stands, wherever it begins."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anynode.models.events import Event, delta_payload
from anynode.server.agents.agent import ToolCall, ToolResult
from anynode.server.agents.tool_calls import tool_calls_json
from anynode.server.api.ai_sdk.fold import NOT_FINISHED, RESET_STEP, Chunks, arguments_of, metadata_of, whole
from anynode.server.engine.steps import Step, steps_in
from anynode.server.engine.turn_events import events_of_stored
from anynode.server.protocol.bodies import StoredTurn
from anynode.server.protocol.encoding import encode
from anynode.server.protocol.frames import CallOfTool, ErrorDetail, Message, Usage
from tests.kit.ai_sdk import Chunk, Shown, shown, steps_of
from tests.kit.examples import examples

TURN = UUID("0199aa10-5f3e-7c51-9b1d-2f5b6f0a7c11")
CONVERSATION = UUID("0199aa10-5f3e-7c51-9b1d-2f5b6f0a7c12")
AT = datetime(2026, 1, 2, 3, 4, 5, 600000, UTC)
USAGE = Usage(3, 4, "scripted", 0.5)
ERROR = ErrorDetail("agent_failed", "The agent failed.", False)
STANDING = {  # types of events up to the last of which a turn stands, by what its agent can do
    "begins again": ("turn.tool_result",),
    "resumes calls": ("turn.tool_call", "turn.tool_result"),
    "continues": ("turn.delta", "turn.tool_call", "turn.tool_result", "turn.restarted"),
}
Entry = tuple[str, Any]  # of a journal: the event's type, and its payload

STARTED: Entry = ("turn.started", {"message_id": "m-1"})


def said(text: str) -> Entry:
    return "turn.delta", {"text": text}


def called(id: str, **arguments: Any) -> Entry:
    return "turn.tool_call", {"tool_call_id": id, "tool_name": "search", "arguments": arguments}


def answered(id: str, content: str = "found", *, is_error: bool = False) -> Entry:
    return "turn.tool_result", {"tool_call_id": id, "tool_name": "search", "content": content, "is_error": is_error}


def restarted(text: str, epoch: int = 2) -> Entry:
    return "turn.restarted", {"epoch": epoch, "text": text}


def ended(status: str = "completed") -> Entry:
    message = Message(TURN, "assistant", "", None, None, None, status, TURN, AT)
    fields: dict[str, Any] = {"message": msgspec.to_builtins(message)}
    if status == "completed":
        fields["usage"] = msgspec.to_builtins(USAGE)
    if status == "failed":
        fields["error"] = msgspec.to_builtins(ERROR)
    return f"turn.{status}", fields


def as_published(payload: Any) -> str:
    """A payload as the node has it that runs the turn."""
    return encode(payload)


def as_stored(payload: Any) -> str:
    """A payload as jsonb gives it back: with spaces, shorter keys first."""
    ordered = payload
    if isinstance(payload, dict):
        ordered = {key: payload[key] for key in sorted(payload, key=lambda key: (len(key), key))}
    return json.dumps(ordered, ensure_ascii=False)


def events_of(journal: Sequence[Entry], encoded: Callable[[Any], str] = as_published) -> list[Event]:
    return [Event(seq, type, str(TURN), encoded(payload)) for seq, (type, payload) in enumerate(journal, 7)]


def taken(journal: Sequence[Entry], encoded: Callable[[Any], str] = as_published) -> list[Chunk]:
    chunks = Chunks(str(TURN))
    return [json.loads(chunk) for event in events_of(journal, encoded) for chunk in chunks.take(event)]


def brief(chunks: Sequence[Chunk]) -> list[str]:
    """Each chunk in a word or two."""
    names = ("id", "delta", "toolCallId", "output", "errorText")
    return [" ".join([chunk["type"], *(str(chunk[name]) for name in names if name in chunk)]) for chunk in chunks]


# What is made of each event.


def test_an_answer_of_text_alone() -> None:
    chunks = taken([STARTED, said("Hel"), said("lo"), ended()])
    assert chunks == [
        {"type": "start", "messageId": str(TURN)},
        {"type": "start-step"},
        {"type": "text-start", "id": "1"},
        {"type": "text-delta", "id": "1", "delta": "Hel"},
        {"type": "text-delta", "id": "1", "delta": "lo"},
        {"type": "text-end", "id": "1"},
        {"type": "finish-step"},
        {
            "type": "finish",
            "finishReason": "stop",
            "messageMetadata": {
                "usage": {"inputTokens": 3, "outputTokens": 4, "totalTokens": 7},
                "seconds": 0.5,
                "model": "scripted",
            },
        },
    ]


def test_calls_divide_steps_and_texts() -> None:
    journal = [
        STARTED,
        *(said("a"), called("1", word="ü"), called("2"), answered("2", "no", is_error=True), answered("1")),
        *(said("b"), called("1"), answered("1"), ended()),
    ]
    chunks = taken(journal)
    assert brief(chunks) == [
        *("start", "start-step", "text-start 1", "text-delta 1 a", "text-end 1"),
        *(
            "tool-input-available 1",
            "tool-input-available 2",
            "tool-output-error 2 no",
            "tool-output-available 1 found",
        ),
        *("finish-step", "start-step", "text-start 2", "text-delta 2 b", "text-end 2"),
        *("tool-input-available 1", "tool-output-available 1 found", "finish-step", "finish"),
    ]
    assert chunks[5] == {
        "type": "tool-input-available",
        "toolCallId": "1",
        "toolName": "search",
        "input": {"word": "ü"},
        "dynamic": True,
        "providerExecuted": True,
    }
    assert chunks[8] == {
        "type": "tool-output-available",
        "toolCallId": "1",
        "output": "found",
        "dynamic": True,
        "providerExecuted": True,
    }


@pytest.mark.parametrize(
    ("status", "last"), [("cancelled", ["abort"]), ("failed", ["error The agent failed."]), ("completed", None)]
)
def test_whatever_is_open_at_the_end_is_closed(status: str, last: list[str] | None) -> None:
    in_text = brief(taken([STARTED, said("a"), ended(status)]))
    assert in_text[-len(last or "xx") - 1 :] == ["text-end 1", *(last or ["finish-step", "finish"])]
    in_calls = brief(taken([STARTED, called("1"), called("2"), answered("1"), called("3"), ended(status)]))
    unanswered = [f"tool-output-error {id} {NOT_FINISHED}" for id in ("2", "3")]
    assert in_calls[-len(last or "xx") - 2 :] == [*unanswered, *(last or ["finish-step", "finish"])]


def test_events_that_say_nothing_of_the_answer_make_no_chunk() -> None:
    created = ("message.created", {"message": {"role": "user", "content": "x"}})
    assert taken([created, STARTED, said("a")]) == taken([STARTED, said("a")])


def test_arguments_that_clients_refuse_to_read_are_shown_without_what_they_refuse() -> None:
    given: Any = {
        "__proto__": {"x": 1},
        "kept": [{"__proto__": 1, "constructor": {"prototype": {}}, "y": [[{"__proto__": None}]]}],
        "constructor": {"name": "kept"},
    }
    journal: list[Entry] = [
        STARTED,
        ("turn.tool_call", {"tool_call_id": "1", "tool_name": "__proto__", "arguments": given}),
        answered("1", '{"__proto__": 1}'),
        said('{"__proto__": 1}'),
    ]
    chunks = taken(journal)
    assert chunks[2]["input"] == {"kept": [{"y": [[{}]]}], "constructor": {"name": "kept"}}
    assert chunks[2]["toolName"] == "__proto__"
    assert shown(chunks).text == '{"__proto__": 1}'


# What is taken back.


@pytest.mark.parametrize(
    ("before", "text", "after"),
    [
        ([], "", []),  # nothing was shown: nothing is taken back
        ([said("ab")], "ab", []),
        ([said("ab")], "", ["reset-step"]),
        ([said("ab")], "a", ["reset-step", "text-start 2", "text-delta 2 a"]),
        ([called("1")], "", ["reset-step"]),
        ([said("a"), called("1")], "a", ["reset-step", "text-start 2", "text-delta 2 a"]),
        ([called("1"), answered("1")], "", []),
        ([said("a"), called("1"), answered("1")], "a", []),
        ([said("a"), called("1"), answered("1"), said("b")], "a", ["reset-step"]),
        ([said("a"), called("1"), answered("1"), said("b")], "ab", []),
        (
            [said("a"), called("1"), called("2"), answered("1"), said("b")],
            "a",
            [
                *("reset-step", "text-start 3", "text-delta 3 a", "text-end 3"),
                *("tool-input-available 1", "tool-output-available 1 found"),
            ],
        ),
        ([said("\N{HOT BEVERAGE}\N{GRINNING FACE}"), said("b")], "\N{HOT BEVERAGE}\N{GRINNING FACE}", None),
    ],
)
def test_a_takeover_takes_back_what_does_not_stand(
    before: Sequence[Entry], text: str, after: Sequence[str] | None
) -> None:
    journal = [STARTED, *before]
    chunks = brief(taken([*journal, restarted(text)]))[len(taken(journal)) :]
    if after is None:
        after = ["reset-step", "text-start 2", f"text-delta 2 {text}"]
    assert chunks == after


def test_the_text_goes_on_in_its_part_where_all_of_it_stands() -> None:
    journal = [STARTED, said("a"), restarted("a"), said("b"), ended()]
    assert [part["text"] for part in shown(taken(journal)).parts if part["type"] == "text"] == ["ab"]
    journal = [STARTED, said("ax"), restarted("a"), said("b"), ended()]
    assert [part["text"] for part in shown(taken(journal)).parts if part["type"] == "text"] == ["ab"]


# Any turn.

TEXT = st.text(st.sampled_from('abc "\\\n\u2028\u00e9\u2615\U0001f600:{}'), min_size=1, max_size=3)
ACTION = st.one_of(
    st.tuples(st.just("text"), TEXT),
    st.tuples(st.just("call"), st.integers(0, 3)),
    st.tuples(st.just("answer"), st.integers(0, 3)),
    st.tuples(st.just("take over"), st.booleans()),
)


@dataclass
class Standing:
    """What stands of a turn, as `steps` has it: the completed steps and the one that is being said."""

    steps: list[Step] = field(default_factory=list)
    step: Step = field(default_factory=Step)

    def begin(self) -> None:
        """What comes next belongs to another step, if this one is complete."""
        if self.step.is_complete:
            self.steps.append(self.step)
            self.step = Step()

    def seen(self, *, is_over: bool) -> list[tuple[str, list[dict[str, Any]]]]:
        """What a client should show of it: of each step that says something the text and the calls."""
        seen = []
        for step in [*self.steps, self.step]:
            results = {result.tool_call_id: result for result in step.results}
            calls = [_part(call, results.get(call.tool_call_id), is_over=is_over) for call in step.calls]
            if step.text or calls:
                seen.append((step.text, calls))
        return seen


def _part(call: ToolCall, result: ToolResult | None, *, is_over: bool) -> dict[str, Any]:
    part = {
        "type": "dynamic-tool",
        "toolName": call.tool_name,
        "toolCallId": call.tool_call_id,
        "input": call.arguments,
        "providerExecuted": True,
    }
    if result is None:
        return part | (
            {"state": "output-error", "errorText": NOT_FINISHED} if is_over else {"state": "input-available"}
        )
    if result.is_error:
        return part | {"state": "output-error", "errorText": result.content}
    return part | {"state": "output-available", "output": result.content}


@dataclass
class Told:
    """The journal of a turn, and after each of its events what stands."""

    journal: list[Entry] = field(default_factory=list)
    standing: list[Standing] = field(default_factory=list)

    def add(self, entry: Entry, standing: Standing) -> None:
        self.journal.append(entry)
        self.standing.append(deepcopy(standing))


@st.composite
def turns(draw: st.DrawFn, *, is_over: bool | None = None) -> Told:
    """A turn that may be taken over any number of times, of any agent, to its end or less far."""
    kinds = STANDING[draw(st.sampled_from(sorted(STANDING)))]
    told, now = Told(), Standing()
    live: list[Entry] = []  # the journal less what has not stood
    told.add(STARTED, now)

    def add(entry: Entry) -> None:
        live.append(entry)
        told.add(entry, now)

    for action in draw(st.lists(ACTION, max_size=14)):
        match action:
            case "text", str(text):
                now.begin()
                now.step.texts.append(text)
                add(said(text))
            case "call", int(number):
                now.begin()
                id = f"call-{number}"
                if all(call.tool_call_id != id for call in now.step.calls):
                    entry = called(id, word=f"{len(told.journal)}")
                    now.step.add_call(ToolCall(**entry[1]))
                    add(entry)
            case "answer", int(number):
                known = {result.tool_call_id for result in now.step.results}
                waiting = [call.tool_call_id for call in now.step.calls if call.tool_call_id not in known]
                if waiting:
                    entry = answered(waiting[number % len(waiting)], f"found {number}", is_error=number == 3)
                    now.step.add_result(ToolResult(**entry[1]))
                    add(entry)
            case "take over", bool(is_ended):
                live, text, now = _taken_over(live, kinds, is_ended=is_ended)
                add(restarted(text))
    if draw(st.booleans()) if is_over is None else is_over:
        told.add(ended(draw(st.sampled_from(["completed", "cancelled", "failed"]))), now)
    return told


def _taken_over(journal: list[Entry], kinds: Sequence[str], *, is_ended: bool) -> tuple[list[Entry], str, Standing]:
    """What stands of a journal at a takeover, with its text; all of it where the turn is only taken to be ended."""
    up_to = max((number for number, (type, _) in enumerate(journal, 1) if type in kinds), default=0)
    standing = journal[: len(journal) if is_ended else up_to]
    steps, partial, _ = steps_in([(type, encode(payload)) for type, payload in standing])
    begun_at = max((number for number, (type, _) in enumerate(standing) if type == "turn.restarted"), default=0)
    text = "".join(payload.get("text", "") for _, payload in standing[begun_at:])
    assert text == "".join(step.text for step in steps) + partial
    return standing, text, Standing(steps, Step([partial]))


def is_end(entry: Entry) -> bool:
    return entry[0] in ("turn.completed", "turn.cancelled", "turn.failed")


@examples(150)
@given(turns())
def test_after_every_event_a_client_shows_what_stands(told: Told) -> None:
    chunks, message = Chunks(str(TURN)), Shown()
    for event, entry, standing in zip(events_of(told.journal), told.journal, told.standing, strict=True):
        for chunk in chunks.take(event):
            message.take(json.loads(chunk))
        seen = steps_of(message.parts)
        assert seen == standing.seen(is_over=is_end(entry))
        assert message.is_over == is_end(entry)


@examples(120)
@given(turns(), st.integers(0, 20))
def test_who_begins_in_the_middle_ends_with_what_all_chunks_make(told: Told, at: int) -> None:
    events = events_of(told.journal)
    at = min(at, len(events))
    chunks = Chunks(str(TURN))
    begun = [json.loads(chunk) for chunk in whole(chunks, events[:at])]
    assert not chunks.takes_back
    assert RESET_STEP not in map(encode, begun)
    message = shown(begun)
    assert message.snapshot() == shown(taken(told.journal[:at])).snapshot()
    for event in events[at:]:
        for chunk in chunks.take(event):
            message.take(json.loads(chunk))
    assert message.snapshot() == shown(taken(told.journal)).snapshot()


@examples(60)
@given(turns())
def test_what_stands_is_shown_in_few_chunks(told: Told) -> None:
    begun = [json.loads(chunk) for chunk in whole(Chunks(str(TURN)), events_of(told.journal))]
    texts = [chunk["id"] for chunk in begun if chunk["type"] == "text-delta"]
    parts = [part for part in shown(begun).parts if part["type"] == "text"]
    restarts = sum(type == "turn.restarted" for type, _ in told.journal)
    assert len(texts) <= len(parts) + restarts  # what a takeover has left of a text is one more
    assert len(set(texts)) == len(parts)


@examples(60)
@given(turns())
def test_the_chunks_and_their_numbers_are_those_of_the_events_however_they_are_written(told: Told) -> None:
    assert taken(told.journal) == taken(told.journal, as_stored)
    chunks, stored = Chunks(str(TURN)), Chunks(str(TURN))
    assert list(map(json.loads, whole(chunks, events_of(told.journal)))) == list(
        map(json.loads, whole(stored, events_of(told.journal, as_stored)))
    )


@examples(120)
@given(turns())
def test_it_says_that_something_is_taken_back_exactly_where_it_is(told: Told) -> None:
    chunks = Chunks(str(TURN))
    before: list[Any] = []
    for event, standing in zip(events_of(told.journal), told.standing, strict=True):
        chunks.takes_back = False
        made = chunks.take(event)
        assert chunks.takes_back == (RESET_STEP in made)
        if event.type == "turn.restarted":
            assert chunks.takes_back == (before != standing.seen(is_over=False))
        else:
            assert not chunks.takes_back
        before = standing.seen(is_over=False)


# Stored turns.


def stored(standing: Standing, status: str) -> StoredTurn:
    """What a turn leaves behind, as `turn` writes it."""
    steps, step = list(standing.steps), deepcopy(standing.step)
    if step.results:
        step.cut()
        steps.append(step)
        step = Step()
    messages = []
    for done in steps:
        calls = msgspec.convert(tool_calls_json(done.calls), list[CallOfTool])
        messages.append(Message(TURN, "assistant", done.text, calls, None, None, "completed", TURN, AT))
        for result in done.results:
            name, id = result.tool_name, result.tool_call_id
            messages.append(Message(TURN, "tool", result.content, None, name, id, "completed", TURN, AT))
    messages.append(Message(TURN, "assistant", step.text, None, None, None, status, TURN, AT))
    return StoredTurn(
        conversation_id=CONVERSATION,
        turn_id=TURN,
        status=status,
        usage=USAGE,
        error=ERROR if status == "failed" else None,
        created_at=AT,
        finished_at=AT,
        messages=messages,
    )


@examples(60)
@given(turns(is_over=True))
def test_what_a_turn_has_left_shows_it_when_its_journal_is_gone(told: Told) -> None:
    status = told.journal[-1][0].removeprefix("turn.")
    turn = stored(told.standing[-1], status)
    live = shown(taken(told.journal))
    chunks = Chunks(str(TURN))
    events = events_of_stored(turn)
    later = shown([json.loads(chunk) for event in events for chunk in chunks.take(event)])
    assert later.snapshot() == shown([json.loads(c) for c in whole(Chunks(str(TURN)), events)]).snapshot()
    assert (later.id, later.is_aborted, later.error) == (live.id, live.is_aborted, live.error)
    assert (later.finish_reason, later.metadata) == (live.finish_reason, live.metadata)
    assert later.text == live.text
    # Calls that nobody has answered are not stored, nor is what was an error.
    answers = [
        (part["toolCallId"], part["input"], part.get("output", part.get("errorText")))
        for part in live.calls
        if part.get("errorText") != NOT_FINISHED
    ]
    # Results are stored in the order in which they came, and calls in theirs.
    assert [(part["toolCallId"], part["input"], part["output"]) for part in later.calls] == answers


def test_a_turn_that_has_left_no_message_is_shown_empty() -> None:
    turn = StoredTurn(
        conversation_id=CONVERSATION,
        turn_id=TURN,
        status="cancelled",
        usage=None,
        error=None,
        created_at=AT,
        finished_at=AT,
        messages=[],
    )
    chunks = Chunks(str(TURN))
    made = [json.loads(chunk) for event in events_of_stored(turn) for chunk in chunks.take(event)]
    assert brief(made) == ["start", "start-step", "abort"]


@pytest.mark.parametrize("arguments", ["", "{", "x"])
def test_arguments_that_are_no_json_are_shown_as_none(arguments: str) -> None:
    assert arguments_of({"function": {"name": "search", "arguments": arguments}}) == {}


@pytest.mark.parametrize(
    ("usage", "metadata"),
    [
        (None, {}),
        (Usage(None, None, None, 0.5), {"usage": {}, "seconds": 0.5}),
        (Usage(0, None, "m", 0.5), {"usage": {"inputTokens": 0}, "seconds": 0.5, "model": "m"}),
        (
            USAGE,
            {"usage": {"inputTokens": 3, "outputTokens": 4, "totalTokens": 7}, "seconds": 0.5, "model": "scripted"},
        ),
    ],
)
def test_usage_is_told_in_the_sdks_words(usage: Usage | None, metadata: Mapping[str, Any]) -> None:
    assert metadata_of(usage) == metadata


def test_a_delta_is_as_the_journal_writes_it() -> None:
    events = [*events_of([STARTED]), Event(8, "turn.delta", str(TURN), delta_payload('"\n\u2028\U0001f600'))]
    assert shown([json.loads(chunk) for chunk in whole(Chunks(str(TURN)), events)]).text == '"\n\u2028\U0001f600'
