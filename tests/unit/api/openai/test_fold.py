"""The Responses API's events: a fold over a turn's journal that shows what stands, and that the stock SDK accepts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from anynode.models.events import Event
from anynode.server.api.openai.fold import Fold, canonical, stored_events, stored_response
from anynode.server.api.openai.wire import ErrorEvent, StreamEvent
from anynode.server.protocol.bodies import StoredTurn
from anynode.server.protocol.encoding import encode
from anynode.server.protocol.frames import ErrorDetail, Message, Usage

TURN = UUID("0199aa10-5f3e-7c51-9b1d-2f5b6f0a7c11")
CONVERSATION = UUID("0199aa10-5f3e-7c51-9b1d-2f5b6f0a7c12")
AT = datetime(2026, 1, 2, 3, 4, 5, 600000, UTC)
MESSAGE = f"msg_{TURN.hex}_"
CALL = f"mcp_{TURN.hex}_"
EVENTS: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)
Journal = Sequence[tuple[str, dict[str, Any]]]
Shown = list[dict[str, Any]]

STARTED = ("turn.started", {"message_id": "m-1"})
USAGE = {"input_tokens": 3, "output_tokens": 4, "model": "scripted", "seconds": 0.5}


def delta(text: str) -> tuple[str, dict[str, Any]]:
    return "turn.delta", {"text": text}


def called(id: str, **arguments: Any) -> tuple[str, dict[str, Any]]:
    return "turn.tool_call", {"tool_call_id": id, "tool_name": "search", "arguments": arguments}


def answered(id: str, content: str = "found", *, is_error: bool = False) -> tuple[str, dict[str, Any]]:
    return "turn.tool_result", {"tool_call_id": id, "tool_name": "search", "content": content, "is_error": is_error}


def restarted(text: str) -> tuple[str, dict[str, Any]]:
    return "turn.restarted", {"epoch": 2, "text": text}


def ended(status: str = "completed", **fields: Any) -> tuple[str, dict[str, Any]]:
    message = Message(TURN, "assistant", "", None, None, None, status, TURN, AT)
    return f"turn.{status}", {"message": msgspec.to_builtins(message), **fields}


def folded(*journal: tuple[str, dict[str, Any]]) -> list[StreamEvent]:
    fold = Fold(TURN, CONVERSATION, "echo")
    events = [Event(seq, type, str(TURN), json.dumps(payload)) for seq, (type, payload) in enumerate(journal, 7)]
    return [shown for event in events for shown in fold.add(event)]


def plain(events: Sequence[StreamEvent]) -> Shown:
    """The events as they are on the wire, which have no gap, and which the SDK's types take."""
    shown: Shown = [json.loads(encode(event)) for event in events]
    assert [event["sequence_number"] for event in shown] == list(range(len(shown)))
    for event in shown:
        EVENTS.validate_python(event)
    return shown


def brief(shown: Shown) -> list[str]:
    """Each event in a word or two: its type, the place of its item, and what it says or how it ends."""
    return [" ".join(_words(event)) for event in shown]


def _words(event: dict[str, Any]) -> Iterator[str]:
    yield event["type"].removeprefix("response.")
    if "output_index" in event:
        yield str(event["output_index"])
    if "delta" in event:
        yield event["delta"]
    if event["type"].endswith("item.done"):
        yield event["item"]["status"]


def text_of(response: dict[str, Any]) -> str:
    return Response.model_validate(response).output_text


def test_text_comes_in_the_order_of_the_api_and_one_delta_of_the_journal_is_one_delta() -> None:
    shown = plain(folded(STARTED, delta("a "), delta("b"), ended(usage=USAGE)))
    assert brief(shown) == [
        "created",
        "in_progress",
        "output_item.added 0",
        "content_part.added 0",
        "output_text.delta 0 a ",
        "output_text.delta 0 b",
        "output_text.done 0",
        "content_part.done 0",
        "output_item.done 0 completed",
        "completed",
    ]
    item = {
        "type": "message",
        "id": MESSAGE + "0",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "a b", "annotations": [], "logprobs": []}],
    }
    assert shown[-2]["item"] == item
    response = shown[-1]["response"]
    assert response["output"] == [item]
    assert response["id"] == f"resp_{TURN.hex}"
    assert response["conversation"] == {"id": f"conv_{CONVERSATION.hex}"}
    assert response["status"] == "completed"
    assert response["model"] == "scripted"
    assert response["completed_at"] == int(AT.timestamp())
    assert response["created_at"] == (TURN.int >> 80) // 1000
    assert response["usage"] == {
        "input_tokens": 3,
        "output_tokens": 4,
        "total_tokens": 7,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens_details": {"reasoning_tokens": 0},
    }
    for event in shown[:2]:
        assert event["response"]["status"] == "in_progress"
        assert event["response"]["output"] == []
        assert event["response"]["model"] == "echo"
        assert event["response"]["usage"] is None


def test_a_turn_that_says_nothing_has_no_items() -> None:
    shown = plain(folded(("message.created", {}), STARTED, ended(usage=None)))
    assert brief(shown) == ["created", "in_progress", "completed"]
    assert shown[-1]["response"]["output"] == []
    assert shown[-1]["response"]["usage"] is None


@pytest.mark.parametrize("unknown", ["input_tokens", "output_tokens"])
def test_usage_that_is_not_known_is_null(unknown: str) -> None:
    shown = plain(folded(STARTED, ended(usage={**USAGE, unknown: None})))
    assert shown[-1]["response"]["usage"] is None


def test_calls_are_items_between_the_messages_and_end_as_their_results_come() -> None:
    shown = plain(
        folded(
            *(STARTED, delta("Let me see. "), called("1", word="apples"), called("2")),
            *(answered("2", "broken", is_error=True), answered("1", "found"), delta("Yes."), ended(usage=USAGE)),
        )
    )
    assert brief(shown)[5:] == [
        "output_text.done 0",
        "content_part.done 0",
        "output_item.done 0 completed",
        "output_item.added 1",
        "mcp_call.in_progress 1",
        "mcp_call_arguments.done 1",
        "output_item.added 2",
        "mcp_call.in_progress 2",
        "mcp_call_arguments.done 2",
        "mcp_call.failed 2",
        "output_item.done 2 failed",
        "mcp_call.completed 1",
        "output_item.done 1 completed",
        "output_item.added 3",
        "content_part.added 3",
        "output_text.delta 3 Yes.",
        "output_text.done 3",
        "content_part.done 3",
        "output_item.done 3 completed",
        "completed",
    ]
    first, one, two, last = shown[-1]["response"]["output"]
    assert (first["id"], last["id"]) == (MESSAGE + "0", MESSAGE + "3")
    assert one == {
        "type": "mcp_call",
        "id": CALL + "1",
        "status": "completed",
        "name": "search",
        "arguments": '{"word":"apples"}',
        "output": "found",
        "error": None,
        "server_label": "anynode",
        "approval_request_id": None,
    }
    assert (two["status"], two["output"]) == ("failed", "broken")
    assert two["error"] == {"type": "mcp_tool_execution_error", "content": [{"type": "text", "text": "broken"}]}
    assert text_of(shown[-1]["response"]) == "Let me see. Yes."


@pytest.mark.parametrize("status", ["cancelled", "failed"])
def test_a_turn_that_is_stopped_keeps_what_was_said_and_loses_calls_without_an_answer(status: str) -> None:
    error = {"code": "agent_failed", "message": "no luck", "retryable": False}
    fields = {"error": error} if status == "failed" else {}
    shown = plain(
        folded(STARTED, called("1"), answered("1"), delta("par"), called("2"), delta("tial"), ended(status, **fields))
    )
    assert brief(shown)[-5:] == [
        "output_text.done 3",
        "content_part.done 3",
        "output_item.done 3 incomplete",
        "output_item.done 2 incomplete",
        "incomplete" if status == "cancelled" else "failed",
    ]
    response = shown[-1]["response"]
    assert response["status"] == status
    assert response["completed_at"] is None
    assert [item["id"] for item in response["output"]] == [CALL + "0", MESSAGE + "1", MESSAGE + "3"]
    assert [item["status"] for item in response["output"]] == ["completed", "completed", "incomplete"]
    assert text_of(response) == "partial"
    assert response["error"] == ({"code": "server_error", "message": "no luck"} if status == "failed" else None)


def test_a_takeover_that_takes_nothing_back_is_not_seen() -> None:
    before = [STARTED, delta("a "), called("1"), answered("1"), delta("b ")]
    after = [delta("c"), ended(usage=USAGE)]
    assert folded(*before, restarted("a b "), *after) == folded(*before, *after)


def test_text_that_is_taken_back_is_an_incomplete_item_and_what_stands_of_it_another_one() -> None:
    shown = plain(folded(STARTED, delta("one two "), delta("three"), restarted("one "), delta("more"), ended()))
    assert brief(shown)[6:] == [
        "output_text.done 0",
        "content_part.done 0",
        "output_item.done 0 incomplete",
        "output_item.added 1",
        "content_part.added 1",
        "output_text.delta 1 one ",
        "output_text.delta 1 more",
        "output_text.done 1",
        "content_part.done 1",
        "output_item.done 1 completed",
        "completed",
    ]
    assert shown[8]["item"]["content"][0]["text"] == "one two three"
    assert [item["id"] for item in shown[-1]["response"]["output"]] == [MESSAGE + "1"]
    assert text_of(shown[-1]["response"]) == "one more"


def test_completed_steps_stand_and_a_cut_one_is_taken_back_with_what_was_over_of_it() -> None:
    shown = plain(
        folded(
            *(STARTED, delta("a "), called("1"), answered("1"), delta("b "), called("2"), called("3")),
            *(restarted("a "), delta("c"), ended()),
        )
    )
    taken = brief(shown).index("output_item.done 2 completed")
    assert brief(shown)[taken + 7 :] == [
        "output_item.done 2 incomplete",
        "output_item.done 3 incomplete",
        "output_item.done 4 incomplete",
        "output_item.added 5",
        "content_part.added 5",
        "output_text.delta 5 c",
        "output_text.done 5",
        "content_part.done 5",
        "output_item.done 5 completed",
        "completed",
    ]
    assert [item["id"] for item in shown[-1]["response"]["output"]] == [MESSAGE + "0", CALL + "1", MESSAGE + "5"]
    assert text_of(shown[-1]["response"]) == "a c"


def test_a_call_that_is_made_again_with_its_id_is_another_item() -> None:
    shown = plain(
        folded(STARTED, delta("a "), called("1"), restarted("a "), called("1"), answered("1", "late"), ended())
    )
    assert brief(shown)[11:13] == ["output_item.done 1 incomplete", "output_item.added 2"]
    message, call = shown[-1]["response"]["output"]
    assert (message["id"], message["status"]) == (MESSAGE + "0", "completed")
    assert (call["id"], call["output"]) == (CALL + "2", "late")


def test_a_step_whose_calls_are_answered_in_part_keeps_those() -> None:
    shown = plain(folded(STARTED, called("1"), called("2"), answered("1"), restarted(""), delta("x"), ended()))
    assert [item["id"] for item in shown[-1]["response"]["output"]] == [CALL + "0", MESSAGE + "2"]


@pytest.mark.parametrize(
    ("from_agent", "from_postgres"),
    [
        (
            '{"b":1,"aa":{"d":[1,{"z":0,"y":null}],"c":true}}',
            '{"b": 1, "aa": {"c": true, "d": [1, {"y": null, "z": 0}]}}',
        ),
        ('{"x":1e3}', '{"x": 1000}'),
        ('{"x":1.50}', '{"x": 1.50}'),
        ('{"x":1e20}', '{"x": 100000000000000000000}'),
        ('{"x":-1.5e300}', '{"x": -15' + "0" * 299 + "}"),
        ('{"x":1e-7}', '{"x": 0.0000001}'),
        ('{"x":-0.0}', '{"x": 0.0}'),
        ('{"x":18446744073709551615}', '{"x": 18446744073709551615}'),
        ('{"x":"☕\\u0001"}', '{"x": "☕\\u0001"}'),
    ],
)
def test_arguments_are_the_same_text_from_the_agent_and_from_postgres(from_agent: str, from_postgres: str) -> None:
    assert canonical(from_agent) == canonical(msgspec.Raw(from_postgres.encode()))


def test_whole_numbers_keep_all_their_digits() -> None:
    assert canonical('{"id":18446744073709551615,"n":-9223372036854775808}') == (
        '{"id":18446744073709551615,"n":-9223372036854775808}'
    )


def test_arguments_that_are_nested_very_deeply_are_shown_as_they_are() -> None:
    deep = '{"x":' + "[" * 900 + "]" * 900 + "}"
    shown = plain(folded(STARTED, called("1", **json.loads(deep)), ended()))
    assert json.loads(shown[4]["arguments"]) == json.loads(deep)


# What is stored.


def message(role: str, content: str, calls: Any = None, name: str | None = None, id: str | None = None) -> Message:
    return Message(TURN, role, content, calls, name, id, "completed", TURN, AT)


def stored(status: str, *messages: Message, error: ErrorDetail | None = None) -> StoredTurn:
    usage = None if status == "running" else msgspec.convert(USAGE, Usage)
    return StoredTurn(CONVERSATION, TURN, status, usage, error, AT, None if status == "running" else AT, messages)


def test_a_stored_turn_is_the_response_that_was_streamed() -> None:
    calls = [{"id": "1", "type": "function", "function": {"name": "search", "arguments": '{"b":1,"a":1e3}'}}]
    turn = stored(
        "completed",
        message("assistant", "Let me see. ", calls),
        message("tool", "found", name="search", id="1"),
        message("assistant", "Yes."),
    )
    streamed = folded(
        *(STARTED, delta("Let me "), delta("see. "), called("1", a=1000, b=1)),
        *(answered("1"), delta("Yes."), ended(usage=USAGE)),
    )
    assert stored_response(turn, "echo") == streamed[-1].response  # type: ignore[attr-defined]
    replayed = plain(stored_events(turn, "echo"))
    assert [each for each in brief(replayed) if "delta" not in each] == [
        each for each in brief(plain(streamed)) if "delta" not in each
    ]


@pytest.mark.parametrize("status", ["cancelled", "failed"])
def test_a_stored_turn_that_was_stopped(status: str) -> None:
    error = ErrorDetail("agent_failed", "no luck", retryable=False) if status == "failed" else None
    response = stored_response(stored(status, message("assistant", "par"), error=error), "echo")
    assert (response.status, response.output[0].status) == (status, "incomplete")
    assert (response.error is None) == (error is None)
    plain(stored_events(stored(status, message("assistant", ""), error=error), "echo"))


def test_a_stored_turn_that_runs_has_nothing_to_show_yet() -> None:
    response = stored_response(stored("running"), "echo")
    assert (response.status, response.output, response.usage) == ("in_progress", [], None)


def test_an_error_is_an_event_of_the_sdk() -> None:
    EVENTS.validate_json(encode(ErrorEvent("not_found", "It is gone.", 3)))


# Any journal.


class Turn:
    """A turn that is made up as it goes: its journal, and the events in it that stand."""

    def __init__(self) -> None:
        self.journal: list[tuple[str, dict[str, Any]]] = [STARTED]
        self.standing: list[tuple[str, dict[str, Any]]] = []
        self.number = 0

    @property
    def text(self) -> str:
        return "".join(payload["text"] for type, payload in self.standing if type == "turn.delta")

    @property
    def waiting(self) -> list[str]:
        """The ids of calls without an answer."""
        made = [payload["tool_call_id"] for type, payload in self.standing if type == "turn.tool_call"]
        return [id for id in made if id not in self.answered]

    @property
    def answered(self) -> list[str]:
        return [payload["tool_call_id"] for type, payload in self.standing if type == "turn.tool_result"]

    def act(self, action: str) -> None:
        self.number += 1
        match action:
            case "delta":
                self._add(delta(f"{self.number} "))
            case "call":
                self._add(called(str(self.number)))
            case "result" if self.waiting:
                self._add(answered(self.waiting[self.number % len(self.waiting)], is_error=self.number % 3 == 0))
            case "restart at results":
                self._restart("turn.tool_result")
            case "restart at calls":
                self._restart("turn.tool_result", "turn.tool_call")
            case "restart":
                self._restart("turn.tool_result", "turn.tool_call", "turn.delta")

    def _add(self, event: tuple[str, dict[str, Any]]) -> None:
        self.journal.append(event)
        self.standing.append(event)

    def _restart(self, *types: str) -> None:
        while self.standing and self.standing[-1][0] not in types:
            self.standing.pop()
        lost = self.waiting
        self.journal.append(restarted(self.text))
        self.standing = [
            (type, payload)
            for type, payload in self.standing
            if type != "turn.tool_call" or payload["tool_call_id"] not in lost
        ]


ACTIONS = ["delta", "delta", "delta", "call", "result", "result", "restart", "restart at results", "restart at calls"]


@given(st.lists(st.sampled_from(ACTIONS), max_size=40))
def test_whatever_happens_the_end_holds_what_stands_and_the_sdk_keeps_up(actions: Sequence[str]) -> None:
    turn = Turn()
    for action in actions:
        turn.act(action)
    events = folded(*turn.journal, ended(usage=USAGE))
    shown = plain(events)
    state = ResponseStreamState[Any](input_tools=omit, text_format=omit)
    for event in shown:
        state.handle_event(EVENTS.validate_python(event))
    response = shown[-1]["response"]
    assert text_of(response) == turn.text
    assert sum(item["type"] == "mcp_call" for item in response["output"]) == len(turn.answered)
    added = [event["output_index"] for event in shown if event["type"] == "response.output_item.added"]
    assert added == list(range(len(added)))
    last = {event["output_index"]: event["item"] for event in shown if event["type"] == "response.output_item.done"}
    assert last.keys() == set(added)
    assert response["output"] == [item for _, item in sorted(last.items()) if item["status"] != "incomplete"]
