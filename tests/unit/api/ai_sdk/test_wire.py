"""The requests of the AI SDK's transports: what is used is checked, and what is not is ignored."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anynode.server.api.ai_sdk.wire import (
    REQUEST_BYTES_MAX,
    AbortFrame,
    ChatRequest,
    ResumeFrame,
    SendFrame,
    chunk_head,
    decode_frame,
    decode_request,
    end_frame,
    error_frame,
    heartbeat_frame,
    no_active_frame,
    question_in,
    ready_frame,
    start_frame,
    token_in,
)
from anynode.server.errors import InvalidFrame
from anynode.server.protocol import frames as protocol

PROTOCOL = (Path(__file__).parents[4] / "PROTOCOL.md").read_text()
request_id_of = partial(protocol.request_id_of, name="requestId")

QUESTION = {"id": "m-1", "role": "user", "parts": [{"type": "text", "text": "Hello"}]}
SEND = {
    "type": "send",
    "requestId": "r-1",
    "id": "chat",
    "trigger": "submit-message",
    "messages": [QUESTION],
    "headers": {},
    "body": {},
}
RESUME = {"type": "resume", "requestId": "r-1", "id": "chat", "headers": {}, "body": {}}
ABORT = {"type": "abort", "requestId": "r-1"}
POST = {"id": "chat", "messages": [QUESTION], "trigger": "submit-message"}
IDS = ["x", " ", "a/b?c#d%2F", "\N{HOT BEVERAGE}" * 128, "y" * 128, "..", '"\\', "\u00e9\u0301", "\U0001f469\u200c"[:1]]
NO_IDS: list[Any] = ["", "x" * 129, "a\nb", "\0", "\u2028", "\ufeff", "\u200b", "\x7f", "\u00a0", None, 7, True, [], {}]

NO_SEQUENCES: list[Any] = [-1, 1.5, "1", 2**63, True, []]
NO_MESSAGES: list[Any] = [None, 1, "x", []]


def decoded(frame: Mapping[str, Any]) -> Any:
    return decode_frame(json.dumps(frame))


def posted(body: Mapping[str, Any]) -> ChatRequest:
    request: ChatRequest = decode_request(json.dumps(body).encode(), (ChatRequest,))
    return request


def without(frame: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {field: value for field, value in frame.items() if field != name}


def asking(message: Any) -> SendFrame:
    frame: SendFrame = decoded({**SEND, "messages": [message]})
    return frame


# Frames.


def test_frames_as_the_sdk_sends_them() -> None:
    send = decoded(SEND)
    assert isinstance(send, SendFrame)
    assert (send.request_id, send.id, send.trigger, send.message_id) == ("r-1", "chat", "submit-message", None)
    assert (send.headers, send.if_busy, len(send.messages)) == ({}, "reject", 1)
    resume = decoded(RESUME)
    assert isinstance(resume, ResumeFrame)
    assert (resume.request_id, resume.id, resume.last_sequence) == ("r-1", "chat", None)
    assert decoded(ABORT) == AbortFrame("r-1")


def test_what_may_be_there_or_not() -> None:
    assert decoded({**SEND, "messageId": "m-0", "trigger": "regenerate-message"}).message_id == "m-0"
    assert decoded({**SEND, "messageId": None}).message_id is None
    assert decoded({**RESUME, "lastSequence": 0}).last_sequence == 0
    assert decoded({**RESUME, "lastSequence": 2**53 - 1}).last_sequence == 2**53 - 1
    assert decoded({**RESUME, "lastSequence": None}).last_sequence is None
    assert decoded({**RESUME, "body": {"wait_after": "m-1", "if_busy": 5}}).wait_after == "m-1"
    for frame in (RESUME, without(RESUME, "body"), {**RESUME, "body": {"wait_after": None}}):
        assert decoded(frame).wait_after is None
    assert decoded(without(without(SEND, "headers"), "body")).if_busy == "reject"
    for if_busy in ("reject", "interrupt"):
        assert decoded({**SEND, "body": {"if_busy": if_busy, "model": "x"}}).if_busy == if_busy
        assert posted({**POST, "if_busy": if_busy}).if_busy == if_busy
    assert posted(without(POST, "trigger")).trigger == "submit-message"


@pytest.mark.parametrize("frame", [SEND, RESUME, ABORT])
def test_fields_that_nobody_knows_are_ignored(frame: Mapping[str, Any]) -> None:
    more = {"metadata": {"x": [1]}, "newer": None, "": 0, "__proto__": {}, "request_id": "other"}
    assert without_messages(decoded({**frame, **more})) == without_messages(decoded(frame))


def without_messages(frame: Any) -> tuple[object, ...]:
    return tuple(getattr(frame, name) for name in type(frame).__struct_fields__ if name != "messages")


@pytest.mark.parametrize("frame", [SEND, RESUME, ABORT])
@pytest.mark.parametrize("id", IDS)
def test_ids_are_any_printable_characters(frame: Mapping[str, Any], id: str) -> None:
    assert decoded({**frame, "requestId": id}).request_id == id
    assert request_id_of(json.dumps({**frame, "requestId": id, "type": "?"})) == id
    if "id" in frame:
        assert decoded({**frame, "id": id}).id == id
        assert posted({**POST, "id": id}).id == id
        assert decoded({**RESUME, "body": {"wait_after": id}}).wait_after == id
        assert question_in(asking({**QUESTION, "id": id})).id == id


@pytest.mark.parametrize("id", NO_IDS)
def test_what_is_no_id_is_refused(id: Any) -> None:
    for frame in (SEND, RESUME, ABORT):
        with pytest.raises(InvalidFrame):
            decoded({**frame, "requestId": id})
        assert request_id_of(json.dumps({**frame, "requestId": id})) is None
    for frame in (SEND, RESUME):
        with pytest.raises(InvalidFrame):
            decoded({**frame, "id": id})
    if id is not None:
        with pytest.raises(InvalidFrame):
            decoded({**RESUME, "body": {"wait_after": id}})
    with pytest.raises(InvalidFrame):
        posted({**POST, "id": id})
    with pytest.raises(InvalidFrame):
        question_in(asking({**QUESTION, "id": id}))


@pytest.mark.parametrize(
    "frame",
    [
        *(without(SEND, name) for name in ("type", "requestId", "id", "trigger", "messages")),
        *(without(RESUME, name) for name in ("type", "requestId", "id")),
        *(without(ABORT, name) for name in ("type", "requestId")),
        {**SEND, "type": "subscribe"},
        {**SEND, "type": 1},
        {**SEND, "trigger": "continue"},
        {**SEND, "messages": []},
        {**SEND, "messages": {}},
        {**SEND, "messages": "Hello"},
        {**SEND, "messageId": 5},
        {**SEND, "body": {"if_busy": "wait"}},
        {**SEND, "body": {"if_busy": None}},
        {**SEND, "headers": {"authorization": 5}},
        {**SEND, "headers": []},
        *({**RESUME, "lastSequence": n} for n in NO_SEQUENCES),
        {**RESUME, "body": []},
    ],
)
def test_what_is_used_is_checked(frame: Mapping[str, Any]) -> None:
    with pytest.raises(InvalidFrame) as refused:
        decoded(frame)
    assert refused.value.message


@pytest.mark.parametrize("text", ["", "x", "null", "[]", "1", '"send"', "{", "{}{}", '{"type":"abort"', "\ud800"])
def test_what_is_no_frame_has_nobody_to_answer(text: str) -> None:
    with pytest.raises(InvalidFrame):
        decode_frame(text)
    assert request_id_of(text) is None


@pytest.mark.parametrize("depth", [10, 2000, 200_000])
def test_a_frame_as_deep_as_it_likes_is_refused_or_ignored(depth: int) -> None:
    deep = "[" * depth + "]" * depth
    text = json.dumps({**ABORT, "metadata": 0}).replace("0", deep)
    try:
        assert decode_frame(text) == AbortFrame("r-1")
    except InvalidFrame:
        assert request_id_of(text) in ("r-1", None)
    whole = "[" * depth
    with pytest.raises(InvalidFrame):
        decode_frame(whole)
    assert request_id_of(whole) is None


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists))
def test_whatever_is_sent_is_decoded_or_refused(value: Any) -> None:
    for text in (
        json.dumps(value),
        *(json.dumps({**SEND, name: value}) for name in SEND),
        *(json.dumps({**RESUME, name: value}) for name in (*RESUME, "lastSequence")),
    ):
        try:
            frame = decode_frame(text)
            if isinstance(frame, SendFrame):
                question_in(frame)
        except InvalidFrame:
            pass
        request_id_of(text)


# The question.


def test_only_the_last_message_is_looked_at() -> None:
    history = [{"whatever": 1}, {"id": "", "role": "assistant", "parts": None}, {}]
    asked = question_in(decoded({**SEND, "messages": [*history, QUESTION]}))
    assert (asked.id, asked.text) == ("m-1", "Hello")
    assert question_in(posted({**POST, "messages": [*history, QUESTION]})) == asked


def test_what_is_no_message_may_not_stand_before_it() -> None:
    """Whether it is refused or ignored: it does not come through as something else."""
    for before in NO_MESSAGES:
        try:
            asked = question_in(decoded({**SEND, "messages": [before, QUESTION]}))
        except InvalidFrame:
            continue
        assert asked.text == "Hello"


def test_parts_are_joined_and_what_else_is_in_them_is_ignored() -> None:
    parts = [
        {"type": "text", "text": "He", "state": "done", "providerMetadata": {"x": {}}},
        {"type": "text", "text": "y"},
    ]
    asked = question_in(asking({**QUESTION, "parts": parts, "metadata": {"createdAt": 1}, "newer": 1}))
    assert asked.text == "Hey"


@pytest.mark.parametrize(
    "message",
    [
        {**QUESTION, "role": "assistant"},
        {**QUESTION, "role": "system"},
        {**QUESTION, "role": "tool"},
        without(QUESTION, "role"),
        without(QUESTION, "id"),
        without(QUESTION, "parts"),
        {**QUESTION, "parts": None},
        {**QUESTION, "parts": "Hello"},
        {**QUESTION, "parts": [{"text": "Hello"}]},
        {**QUESTION, "parts": [{"type": "text"}]},
        {**QUESTION, "parts": [{"type": "text", "text": None}]},
        {**QUESTION, "parts": [{"type": "text", "text": 5}]},
        {**QUESTION, "parts": [{"type": "file", "mediaType": "image/png", "url": "data:,"}]},
        {**QUESTION, "parts": [*QUESTION["parts"], {"type": "file", "mediaType": "image/png", "url": "data:,"}]},
        {**QUESTION, "parts": [*QUESTION["parts"], {"type": "data-x", "data": 1}]},
        {**QUESTION, "parts": [{"type": "text", "text": "a\0b"}]},
        {**QUESTION, "parts": [{"type": "text", "text": "a\ud800b"}]},
        {**QUESTION, "parts": [{"type": "text", "text": "a\ud83d"}, {"type": "text", "text": "\ude00"}]},
    ],
)
def test_what_cannot_be_asked_is_refused_with_a_reason(message: Any) -> None:
    with pytest.raises(InvalidFrame) as refused:
        question_in(asking(message))
    assert refused.value.message


def test_a_whole_character_in_escapes_is_no_lone_half() -> None:
    text = json.dumps({**SEND, "messages": [{**QUESTION, "parts": [{"type": "text", "text": "\U0001f600"}]}]})
    assert "\\ud83d\\ude00" in text
    frame = decode_frame(text)
    assert isinstance(frame, SendFrame)
    assert question_in(frame).text == "\U0001f600"


# Bodies over HTTP.


@pytest.mark.parametrize("data", [b"", b"{}", b"null", b"[]", b"x", b"\xff", b'{"id":"\xff","messages":[{}]}'])
def test_a_body_that_is_none_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidFrame):
        decode_request(data, (ChatRequest,))


@pytest.mark.parametrize(
    "change", [{"if_busy": "wait"}, {"if_busy": None}, {"trigger": "resume"}, {"trigger": None}, {"messages": []}]
)
def test_a_body_is_checked_where_it_is_used(change: Mapping[str, Any]) -> None:
    with pytest.raises(InvalidFrame):
        posted({**POST, **change})
    assert posted({**POST, "model": "x", "anything": [change]}).id == "chat"


# Tokens.


@pytest.mark.parametrize(
    ("headers", "token"),
    [
        ({}, None),
        ({"authorization": "Bearer abc"}, "abc"),
        ({"Authorization": "bearer abc"}, "abc"),
        ({"AUTHORIZATION": "  BEARER   abc  "}, "abc"),
        ({"x": "Bearer abc"}, None),
        ({"authorization": "abc"}, None),
        ({"authorization": "Bearer"}, None),
        ({"authorization": "Bearer "}, None),
        ({"authorization": "Basic abc"}, None),
        ({"authorization": ""}, None),
        ({"authorization": "Basic x", "Authorization": "Bearer abc"}, "abc"),
    ],
)
def test_the_token_in_the_headers(headers: Mapping[str, str], token: str | None) -> None:
    assert token_in(headers) == token


# What is sent.

SAYING: list[Callable[[str], str]] = [
    start_frame,
    end_frame,
    no_active_frame,
    lambda id: error_frame(id, 'No "\n\u2028'),
    lambda id: chunk_head(id) + '0,"chunk":{"type":"abort"}}',
]


def test_frames_of_no_request_have_an_id_that_no_request_has_and_are_those_of_the_protocol() -> None:
    frames = [json.loads(ready_frame("a-node", 10.0)), json.loads(heartbeat_frame())]
    assert [frame["requestId"] for frame in frames] == [""] * 2
    table = PROTOCOL.split("| server sends, if asked to |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", table, re.M)
    assert {type: set(re.findall(r"\w+", names)) for type, names in rows} == {
        frame["type"]: frame.keys() - {"type"} for frame in frames
    }


@pytest.mark.parametrize("say", SAYING)
@pytest.mark.parametrize("id", IDS)
def test_every_frame_names_its_request(say: Callable[[str], str], id: str) -> None:
    frame = json.loads(say(id))
    assert frame.pop("requestId") == id
    assert frame in (
        {"type": "start"},
        {"type": "end"},
        {"type": "no-active"},
        {"type": "error", "errorText": 'No "\n\u2028'},
        {"type": "chunk", "sequence": 0, "chunk": {"type": "abort"}},
    )


def test_a_long_chat_fits() -> None:
    assert REQUEST_BYTES_MAX == 4 * 1024 * 1024
    assert len(json.dumps({**SEND, "messages": [QUESTION] * 40_000})) < REQUEST_BYTES_MAX
