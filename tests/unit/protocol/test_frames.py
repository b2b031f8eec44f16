"""The wire without a wire: what a client's frame may be, and what the journal's events look like to clients."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any, get_args
from uuid import UUID

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anynode.server.errors import CLIENT_ERRORS, InvalidFrame
from anynode.server.protocol.encoding import encode
from anynode.server.protocol.frames import (
    SEQ_MAX,
    AnyClientFrame,
    AnyServerFrame,
    Auth,
    AuthExpiring,
    ConversationFollow,
    ConversationSnapshot,
    ConversationUnfollow,
    Error,
    Goaway,
    Heartbeat,
    Message,
    MessageSend,
    Ping,
    Pong,
    Ready,
    RunningTurn,
    ServerFrame,
    TurnCancel,
    decode_frame,
    request_id_of,
)

CONVERSATION = UUID("018f0000-0000-7000-8000-000000000001")
TURN = UUID("018f0000-0000-7000-8000-000000000002")
OTHER_TURN = UUID("018f0000-0000-7000-8000-000000000003")
MESSAGE = Message(
    UUID(int=4), "assistant", "hé", None, None, None, "completed", TURN, datetime(2024, 5, 6, 7, 8, 9, 10, tzinfo=UTC)
)


def frame(type: str, **fields: Any) -> str:
    return json.dumps({"type": type, **fields})


def follow(after: str) -> str:
    """A `conversation.follow` whose `after` is written by hand."""
    return f'{{"type":"conversation.follow","conversation_id":"{CONVERSATION}","after":{after}}}'


def refusal(text: str) -> str:
    with pytest.raises(InvalidFrame) as refused:
        decode_frame(text)
    return refused.value.message


# What is a frame.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (frame("auth", token="t"), Auth("t")),
        (frame("message.send", message_id="m", content="c"), MessageSend("m", "c")),
        (
            frame(
                "message.send",
                message_id="m",
                content="c",
                conversation_id=str(CONVERSATION),
                if_busy="interrupt",
                request_id="r",
            ),
            MessageSend("m", "c", CONVERSATION, "interrupt", "r"),
        ),
        (frame("message.send", message_id="m", content="c", conversation_id=None), MessageSend("m", "c", None)),
        (frame("conversation.follow", conversation_id=str(CONVERSATION)), ConversationFollow(CONVERSATION)),
        (follow("0"), ConversationFollow(CONVERSATION, 0)),
        (follow(str(SEQ_MAX)), ConversationFollow(CONVERSATION, 2**63 - 1)),
        (frame("conversation.unfollow", conversation_id=str(CONVERSATION)), ConversationUnfollow(CONVERSATION)),
        (frame("turn.cancel", conversation_id=str(CONVERSATION)), TurnCancel(CONVERSATION)),
        (
            frame("turn.cancel", conversation_id=str(CONVERSATION), turn_id=str(TURN)),
            TurnCancel(CONVERSATION, TURN),
        ),
        (frame("ping"), Ping()),
        (frame("ping", request_id="r"), Ping("r")),
    ],
)
def test_every_frame_of_a_client_is_decoded(text: str, expected: AnyClientFrame) -> None:
    assert decode_frame(text) == expected


@pytest.mark.parametrize("message_id", ["x", "x" * 128, "ö" * 128, "\U0001f600" * 128, "a b"])
def test_a_message_id_has_up_to_128_printable_characters(message_id: str) -> None:
    decoded = decode_frame(frame("message.send", message_id=message_id, content="c"))
    assert isinstance(decoded, MessageSend)
    assert decoded.message_id == message_id


def test_an_escaped_surrogate_pair_is_a_character() -> None:
    decoded = decode_frame('{"type":"message.send","message_id":"m","content":"\\ud83d\\ude00"}')
    assert isinstance(decoded, MessageSend)
    assert decoded.content == "\U0001f600"


# What is not.


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("{", id="cut"),
        pytest.param("[]", id="list"),
        pytest.param('"ping"', id="string"),
        pytest.param("null", id="null"),
        pytest.param("1", id="number"),
        pytest.param('{"type":"ping"} {"type":"ping"}', id="two"),
        pytest.param('\ufeff{"type":"ping"}', id="byte order mark"),
        pytest.param("{'type':'ping'}", id="single quotes"),
        pytest.param("{}", id="no type"),
        pytest.param(frame("pong"), id="type of the server"),
        pytest.param(frame("turn.explain", conversation_id=str(CONVERSATION)), id="type of a later version"),
        pytest.param('{"type":1}', id="type is a number"),
        pytest.param('{"type":["ping"]}', id="type is a list"),
        pytest.param('{"type":null}', id="type is null"),
        pytest.param(frame("ping", more=1), id="unknown field"),
        pytest.param(frame("auth", token="t", request_id="r"), id="a field of other frames"),
        pytest.param(frame("auth"), id="missing token"),
        pytest.param(frame("message.send", content="c"), id="missing message_id"),
        pytest.param(frame("message.send", message_id="m"), id="missing content"),
        pytest.param(frame("conversation.follow"), id="missing conversation_id"),
        pytest.param(frame("auth", token=1), id="token is a number"),
        pytest.param(frame("auth", token=None), id="token is null"),
        pytest.param(frame("message.send", message_id=1, content="c"), id="message_id is a number"),
        pytest.param(frame("message.send", message_id="m", content=["c"]), id="content is a list"),
        pytest.param(frame("message.send", message_id="m", content=None), id="content is null"),
        pytest.param(frame("message.send", message_id="m", content="c", if_busy="wait"), id="unknown if_busy"),
        pytest.param(frame("message.send", message_id="m", content="c", if_busy=None), id="if_busy is null"),
        pytest.param(frame("conversation.follow", conversation_id="mine"), id="conversation_id is no UUID"),
        pytest.param(frame("conversation.follow", conversation_id=None), id="conversation_id is null"),
        pytest.param(frame("turn.cancel", conversation_id=str(CONVERSATION), turn_id="x"), id="turn_id is no UUID"),
        pytest.param(frame("ping", request_id=1), id="request_id is a number"),
        pytest.param('{"type":"ping","type":"ping"}', id="a key twice"),
        pytest.param('{"type":"ping","request_id":{"a":1,"a":2}}', id="a key twice further down"),
        pytest.param(frame("message.send", message_id="", content="c"), id="message_id empty"),
        pytest.param(frame("message.send", message_id="x" * 129, content="c"), id="message_id too long"),
        pytest.param(frame("message.send", message_id="a\nb", content="c"), id="message_id with a line feed"),
        pytest.param(frame("message.send", message_id="a\u202eb", content="c"), id="message_id with a direction mark"),
        pytest.param(frame("message.send", message_id="a\x7f", content="c"), id="message_id with DEL"),
        pytest.param(frame("ping", request_id=""), id="request_id empty"),
        pytest.param(frame("ping", request_id="x" * 129), id="request_id too long"),
        pytest.param(frame("ping", request_id="\x1b[0m"), id="request_id with an escape"),
        pytest.param(frame("message.send", message_id="m", content="a\0b"), id="NUL in content"),
        pytest.param(frame("auth", token="a\0b"), id="NUL in token"),
        pytest.param(frame("message.send", message_id="m", content="a\ud800b"), id="lone high surrogate"),
        pytest.param(frame("message.send", message_id="m", content="\udc00\ud800"), id="surrogates in wrong order"),
        pytest.param(frame("ping", **{"\0": 1}), id="NUL in a key"),
        pytest.param(frame("ping", **{"\ud800": 1}), id="lone surrogate in a key"),
        pytest.param(frame("\ud800"), id="lone surrogate as type"),
        pytest.param('{"type":"ping","request_id":["\\ud800"]}', id="lone surrogate in a list"),
        pytest.param('{"type":"ping","request_id":' + "[" * 100_000 + "]" * 100_000 + "}", id="lists too deep"),
        pytest.param('{"a":' * 100_000 + "1" + "}" * 100_000, id="objects too deep"),
    ],
)
def test_whatever_is_not_exactly_a_frame_is_an_invalid_frame(text: str) -> None:
    # The message goes into an `error` frame, which must be encodable whatever the client sent.
    assert json.loads(encode(refusal(text)))


@pytest.mark.parametrize(
    "after",
    ["-1", "9223372036854775808", "9" * 400, "9" * 5000, "true", "false", '"0"', "1.5", "1e400", "-0.5", "[]"],
)
def test_a_cursor_is_a_whole_number_from_0_to_2_to_the_63_minus_1(after: str) -> None:
    assert json.loads(encode(refusal(follow(after))))


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_constants_that_are_not_json_are_refused_by_name(constant: str) -> None:
    assert refusal(follow(constant)) == f"the frame has {constant}, which is not JSON"


def test_a_refusal_never_repeats_the_token() -> None:
    token = "s3cr3t-s3cr3t"
    for text in (
        frame("auth", token=token, more=1),
        frame("auth", token=[token]),
        frame("auth", token=token + "\0"),
        f'{{"type":"auth","token":"{token}","token":"{token}"}}',
        f'{{"type":"auth","token":"{token}"',
        f'{{"type":"auth","token":{token}}}',
    ):
        assert token not in refusal(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec=None)), inner, max_size=3),
    max_leaves=8,
)
TYPES = ["auth", "message.send", "conversation.follow", "conversation.unfollow", "turn.cancel", "ping", "pong"]
FIELDS = ["token", "message_id", "content", "conversation_id", "if_busy", "request_id", "after", "turn_id", "more"]
PLAUSIBLE = st.one_of(JSON, st.just(str(CONVERSATION)), st.just("reject"), st.text(min_size=1, max_size=3))


@given(st.text(st.characters(codec=None)) | JSON.map(json.dumps))
def test_any_text_is_a_frame_or_an_invalid_frame(text: str) -> None:
    _decode_or_refuse(text)


@given(
    st.builds(
        lambda type, fields: json.dumps({"type": type, **fields}),
        st.sampled_from(TYPES) | JSON,
        st.dictionaries(st.sampled_from(FIELDS) | st.text(st.characters(codec=None), max_size=2), PLAUSIBLE),
    )
)
def test_almost_a_frame_is_a_frame_or_an_invalid_frame(text: str) -> None:
    _decode_or_refuse(text)


def _decode_or_refuse(text: str) -> None:
    try:
        decoded = decode_frame(text)
    except InvalidFrame as refused:
        encode(refused.message)
    else:
        assert isinstance(decoded, get_args(AnyClientFrame))
        encode(decoded)


# The request_id of what was refused.


def test_the_request_id_of_a_refused_frame_is_found() -> None:
    assert request_id_of('{"type":"nonsense","request_id":"r1","more":NaN}') == "r1"


@pytest.mark.parametrize(
    ("rest", "said"),
    [
        ('"content":"y","x":1', "unknown field `x`"),
        ('"content":1', "Expected `str`"),
        ('"content":"y","content":"z"', "duplicate key"),
        ('"content":"\\u0000"', "NUL"),
        ('"content":"y', "not JSON"),
        ('"content":NaN', "not JSON"),
    ],
)
def test_a_long_frame_is_decoded_strictly(rest: str, said: str) -> None:
    with pytest.raises(InvalidFrame, match=said):
        decode_frame(f'{{"type":"message.send","message_id":"m-1",{" " * 20_000}{rest}}}')


def test_a_long_frame_is_decoded_as_a_short_one() -> None:
    frame = decode_frame(json.dumps({"type": "message.send", "message_id": "m-1", "content": "é" * 20_000}))
    assert frame == MessageSend("m-1", "é" * 20_000)


def test_the_request_id_of_a_long_frame_is_found_without_decoding_the_rest() -> None:
    more = ",".join(['{"a":1}'] * 5000)
    assert request_id_of(f'{{"more":[{more}],"request_id":"r1"}}') == "r1"
    assert request_id_of(f'{{"more":[{more}],"requestId":"r1"}}', "requestId") == "r1"
    for rest in ('"request_id":1', '"request_id":"\ud800"', '"request_id":[' + more + "]", '"requestId":"r1"', "junk"):
        assert request_id_of(f'{{"more":[{more}],{rest}}}') is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "junk",
        "[]",
        '"request_id"',
        "1",
        "{}",
        '{"request_id":1}',
        '{"request_id":""}',
        '{"request_id":"a\\u0000"}',
        '{"request_id":"\\ud800"}',
        json.dumps({"request_id": "x" * 129}),
        "[" * 100_000,
        '{"a":' + "9" * 5000 + ',"request_id":"r"}',
    ],
)
def test_a_frame_without_a_usable_request_id_has_none(text: str) -> None:
    assert request_id_of(text) is None


# What clients are sent.


def strictly(text: str) -> ServerFrame:
    """The frame in `text`, which must have every field of its type and no other."""
    decoded: ServerFrame = msgspec.json.decode(text, type=AnyServerFrame)
    assert json.loads(text) == json.loads(encode(decoded))
    return decoded


@pytest.mark.parametrize(
    ("shown", "fields"),
    [
        (Ready("ada", "n", "anynode.v1", 10.0), {"user_id", "node_id", "protocol", "heartbeat_seconds"}),
        (Heartbeat(), set()),
        (
            ConversationSnapshot(CONVERSATION, [MESSAGE], RunningTurn(TURN, "so far"), 7, has_older=True),
            {"conversation_id", "messages", "turn", "seq", "has_older"},
        ),
        (ConversationSnapshot(CONVERSATION, [], None, 0), {"conversation_id", "messages", "turn", "seq", "has_older"}),
        (AuthExpiring(1.5), {"expires_at"}),
        (Goaway("restarting", 2.5), {"reason", "deadline"}),
        (Pong(), set()),
        (Pong("r"), {"request_id"}),
        (Error("not_found", "x", False), {"code", "message", "retryable"}),
        (
            Error("not_found", "x", False, "r", CONVERSATION),
            {"code", "message", "retryable", "request_id", "conversation_id"},
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, ServerFrame) else "",
)
def test_a_frame_has_exactly_the_fields_of_the_design(shown: ServerFrame, fields: set[str]) -> None:
    text = encode(shown)
    assert set(json.loads(text)) == {"type"} | fields
    assert strictly(text) == shown


def test_a_message_has_exactly_the_fields_of_the_design() -> None:
    assert set(json.loads(encode(MESSAGE))) == {
        *("id", "role", "content", "tool_calls", "tool_name", "tool_call_id", "status", "turn_id", "created_at")
    }


def test_the_error_codes_are_those_of_the_design() -> None:
    assert [error.code for error in CLIENT_ERRORS] == [
        *("invalid_frame", "not_found", "conversation_busy", "role_order", "message_too_large", "rate_limited"),
        *("unauthorized", "forbidden", "draining", "database_unavailable", "keys_unavailable", "agent_failed"),
        "internal_error",  # over HTTP, where a socket is closed with 1011
    ]
