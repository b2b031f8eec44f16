"""What HTTP requests and their answers hold: each body is strict, bounded and cannot be changed; answers are whole."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, cast
from uuid import UUID

import msgspec
import pytest
from msgspec import UNSET, Raw

from anynode.server.protocol import bodies
from anynode.server.protocol.bodies import (
    MESSAGES_AT_ONCE_MAX,
    TEXT_PARTS_MAX,
    TOOL_CALLS_MAX,
    AnyPostedMessage,
    AssistantMessage,
    Body,
    Cancel,
    CancelledTurn,
    Chat,
    Continue,
    Conversation,
    ConversationChanges,
    Conversations,
    ConversationsQuery,
    ErrorBody,
    EventsQuery,
    ExportedMessage,
    Mark,
    MessagesQuery,
    NewCall,
    NewCalledFunction,
    NewConversation,
    NewMessages,
    NoQuery,
    PostedMessage,
    Refusal,
    Regenerate,
    StartedTurn,
    StoredTurn,
    SystemMessage,
    TextPart,
    ToolMessage,
    UserMessage,
    WrongPart,
)
from anynode.server.protocol.encoding import encode
from anynode.server.protocol.frames import SEQ_MAX, Usage

ID = UUID("018f0000-0000-7000-8000-000000000001")
NOW = datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC)


def kinds(kind: type[Body] = Body) -> Iterator[type[Body]]:
    """Every kind of body that a client may send."""
    for each in kind.__subclasses__():
        if each.__module__ == bodies.__name__:
            if each is not PostedMessage:
                yield each
            yield from kinds(each)


# One of each, with nothing but what it must have.
SMALLEST: dict[type[Body], dict[str, Any]] = {
    NoQuery: {},
    ConversationsQuery: {},
    MessagesQuery: {},
    EventsQuery: {},
    NewConversation: {},
    ConversationChanges: {},
    NewCalledFunction: {"name": "f", "arguments": ""},
    NewCall: {"id": "1", "function": {"name": "f", "arguments": ""}},
    TextPart: {"text": ""},
    SystemMessage: {"role": "system", "content": "x"},
    UserMessage: {"role": "user", "content": "x"},
    AssistantMessage: {"role": "assistant"},
    ToolMessage: {"role": "tool", "tool_call_id": "1", "content": ""},
    NewMessages: {"messages": [{"role": "user", "content": "x"}]},
    Continue: {},
    Chat: {"message": "x"},
    Cancel: {},
    Regenerate: {},
}


def test_the_smallest_bodies_above_are_of_every_kind() -> None:
    assert set(SMALLEST) == set(kinds())


EVERY_KIND = pytest.mark.parametrize("kind", SMALLEST, ids=lambda kind: kind.__name__)


@EVERY_KIND
def test_a_body_needs_no_more_than_this(kind: type[Body]) -> None:
    assert isinstance(msgspec.convert(SMALLEST[kind], kind), kind)


@EVERY_KIND
def test_a_body_with_a_field_that_is_not_known_is_refused(kind: type[Body]) -> None:
    with pytest.raises(msgspec.ValidationError, match="unknown field `nonsense`"):
        msgspec.convert(SMALLEST[kind] | {"nonsense": 1}, kind)


@EVERY_KIND
def test_a_body_without_a_field_that_it_must_have_is_refused(kind: type[Body]) -> None:
    for name in SMALLEST[kind]:
        if name != "role":  # of a message alone, the kind says it
            with pytest.raises(msgspec.ValidationError, match=f"required field `{name}`"):
                msgspec.convert({key: value for key, value in SMALLEST[kind].items() if key != name}, kind)


@EVERY_KIND
def test_a_body_cannot_be_changed(kind: type[Body]) -> None:
    body = msgspec.convert(SMALLEST[kind], kind)
    for name in body.__struct_fields__:
        with pytest.raises(AttributeError):
            setattr(body, name, None)


@EVERY_KIND
def test_a_body_has_fields_of_its_own_kinds_only(kind: type[Body]) -> None:
    for name in kind.__struct_fields__:
        with pytest.raises(msgspec.ValidationError, match=rf"\$\.{name}"):
            msgspec.convert(SMALLEST[kind] | {name: object()}, kind)


@pytest.mark.parametrize(
    ("kind", "field", "good", "bad"),
    [
        (ConversationsQuery, "limit", [1, 100], [0, 101, -1]),
        (ConversationsQuery, "skip", [0, 10_000], [-1, 10_001]),
        (ConversationsQuery, "search", ["x", "x" * 100], ["", "x" * 101]),
        (MessagesQuery, "limit", [1, 1000], [0, 1001]),
        (MessagesQuery, "format", ["openai"], ["OpenAI", ""]),
        (EventsQuery, "after", [0, SEQ_MAX], [-1, SEQ_MAX + 1]),
        (NewConversation, "title", ["x", "x" * 200, None], ["", "x" * 201]),
        (NewConversation, "client_id", [None, "x" * 128], ["", "x" * 129, 1]),
        (ConversationChanges, "title", ["x", "x" * 200, None], ["", "x" * 201]),
        (NewCalledFunction, "name", ["x", "x" * 256], ["", "x" * 257]),
        (NewCall, "id", ["x", "x" * 128], ["", "x" * 129]),
        (NewCall, "type", ["function"], ["tool"]),
        (TextPart, "type", ["text"], ["image_url"]),
        (UserMessage, "content", ["x", [{"text": "x"}] * TEXT_PARTS_MAX], ["", [], [{"text": "x"}] * 129]),
        (AssistantMessage, "content", ["", None, [{"text": ""}]], [[], [{"text": "x"}] * 129]),
        (AssistantMessage, "tool_calls", [None, []], [[SMALLEST[NewCall]] * (TOOL_CALLS_MAX + 1)]),
        (ToolMessage, "tool_name", [None, "x" * 256], ["", "x" * 257]),
        (NewMessages, "messages", [[{"role": "assistant"}] * MESSAGES_AT_ONCE_MAX], [[]]),
        (Continue, "if_busy", ["reject", "interrupt"], ["queue", None]),
        (Continue, "message_id", [None, "x" * 128], ["", "x" * 129]),
        (Continue, "wait", [True, False], [0, "true", None]),
        (Chat, "conversation_id", [None, str(ID)], ["x", ""]),
    ],
)
def test_every_field_has_its_bounds(kind: type[Body], field: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        msgspec.convert(SMALLEST[kind] | {field: value}, kind)
    for value in bad:
        with pytest.raises(msgspec.ValidationError, match=rf"\$\.{field}"):
            msgspec.convert(SMALLEST[kind] | {field: value}, kind)


def test_more_messages_than_fit_are_refused() -> None:
    messages = [{"role": "assistant"}] * (MESSAGES_AT_ONCE_MAX + 1)
    with pytest.raises(msgspec.ValidationError, match="length <= 2000"):
        msgspec.convert({"messages": messages}, NewMessages)


@pytest.mark.parametrize(("role", "kind"), [("system", SystemMessage), ("user", UserMessage), ("tool", ToolMessage)])
def test_a_message_is_of_the_kind_of_its_role(role: str, kind: type[PostedMessage]) -> None:
    assert type(msgspec.convert(SMALLEST[kind], AnyPostedMessage)) is kind
    assert kind.__struct_config__.tag == role


@pytest.mark.parametrize("role", ["developer", "function", "Assistant", "", None])
def test_a_message_of_another_role_is_refused(role: object) -> None:
    with pytest.raises(msgspec.ValidationError, match=r"\$\.role"):
        msgspec.convert({"role": role, "content": "x"}, AnyPostedMessage)


def test_what_is_asked_without_options_rejects_where_busy_and_waits() -> None:
    asked = msgspec.convert({"content": "x"}, Continue)
    assert (asked.message_id, asked.if_busy, asked.wait) == (None, "reject", True)
    assert (Cancel().turn_id, Regenerate().message_id, Regenerate().wait) == (None, None, True)


def test_changes_tell_what_is_absent_from_what_is_null() -> None:
    assert ConversationChanges() == ConversationChanges(UNSET, UNSET, UNSET)
    assert msgspec.convert({"title": None}, ConversationChanges) == ConversationChanges(None, UNSET, UNSET)


def test_two_conversations_do_not_share_their_metadata() -> None:
    one, other = msgspec.convert({}, NewConversation), msgspec.convert({}, NewConversation)
    one.metadata["a"] = 1
    assert other.metadata == {}


def test_the_pattern_of_a_mark_is_that_of_the_marks_that_are_given() -> None:
    (meta,) = cast(Any, Mark).__metadata__
    pattern = re.compile(meta.extra_json_schema["pattern"])
    assert pattern.fullmatch(f"1714979289000000.{ID}")
    assert not pattern.search(f"1714979289000000.{ID} ")
    assert not pattern.search(f"17149792890000000.{ID}")


# Answers.


def test_a_page_of_conversations_says_what_is_null() -> None:
    conversation = Conversation(ID, None, None, None, Raw(b'{"a":1e308}'), 7, NOW, NOW)
    shown = json.loads(encode(Conversations([conversation], None, None)))
    assert (shown["next_skip"], shown["next_before"]) == (None, None)
    assert [shown["conversations"][0][name] for name in ("client_id", "title", "system_prompt")] == [None, None, None]
    assert '"metadata":{"a":1e308}' in encode(conversation)  # as it is stored


def test_an_exported_message_has_only_the_fields_that_its_role_has() -> None:
    assert json.loads(encode(ExportedMessage("user", "x"))) == {"role": "user", "content": "x"}
    assert json.loads(encode(ExportedMessage("assistant", None))) == {"role": "assistant", "content": None}
    assert json.loads(encode(ExportedMessage("tool", "x", tool_call_id="1"))) == {
        "role": "tool",
        "content": "x",
        "tool_call_id": "1",
    }


def test_a_turn_that_runs_shows_what_it_does_not_have_yet_as_null() -> None:
    shown = json.loads(encode(StoredTurn(ID, ID, "running", None, None, NOW, None, [])))
    assert [shown[name] for name in ("usage", "error", "finished_at", "messages")] == [None, None, None, []]
    usage = Usage(1, None, None, 0.5)
    shown = json.loads(encode(StoredTurn(ID, ID, "completed", usage, None, NOW, NOW, [])))
    assert shown["usage"] == {"input_tokens": 1, "output_tokens": None, "model": None, "seconds": 0.5}


def test_what_may_be_gone_is_null() -> None:
    assert json.loads(encode(StartedTurn(ID, ID, None)))["after"] is None
    assert json.loads(encode(CancelledTurn(ID, None)))["turn_id"] is None


def test_a_refusal_tells_only_what_it_knows() -> None:
    assert json.loads(encode(Refusal(ErrorBody("not_found", "x")))) == {"error": {"code": "not_found", "message": "x"}}
    whole = ErrorBody("invalid_frame", "x", [WrongPart("messages[2].role", "is missing")], ID, "m")
    assert json.loads(encode(Refusal(whole)))["error"] == {
        "code": "invalid_frame",
        "message": "x",
        "details": [{"path": "messages[2].role", "message": "is missing"}],
        "conversation_id": str(ID),
        "message_id": "m",
    }
