"""PROTOCOL.md is the wire: every frame, field, code and limit of the code stands in it, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from msgspec.structs import FieldInfo, fields
from websockets import http11

from anynode.models import database
from anynode.server import errors, serve
from anynode.server.api import operations, tickets
from anynode.server.api.ai_sdk import wire as ai_sdk
from anynode.server.api.ai_sdk.stops import STOP_SECONDS
from anynode.server.api.ai_sdk.wire import AnyFrame
from anynode.server.api.operations import AI_SDK, OPERATIONS, RESPONSES, REST
from anynode.server.engine.held import HELD_PER_USER_MAX
from anynode.server.errors import CLIENT_ERRORS, HTTP_ERRORS, AgentFailed
from anynode.server.protocol import bodies, conversation_fields, decoding
from anynode.server.protocol.bodies import AnyPostedMessage
from anynode.server.protocol.encoding import encode
from anynode.server.protocol.frames import (
    JOURNAL_FRAMES,
    SUBPROTOCOL,
    AnyClientFrame,
    AnyServerFrame,
    JournalFrame,
    Message,
    Usage,
    decode_frame,
)
from anynode.server.reference.examples import FRAMES
from anynode.server.settings import Settings
from anynode.server.transport import allowance, bounded_http, bounded_websocket, connection, http, peers, shares

PROTOCOL = (Path(__file__).parents[2] / "PROTOCOL.md").read_text()
CLIENT_FRAMES: tuple[type[msgspec.Struct], ...] = get_args(AnyClientFrame)
SERVER_FRAMES: tuple[type[msgspec.Struct], ...] = get_args(AnyServerFrame)
LIBRARY_CLOSE_CODES = {1007, 1009}  # those that the WebSocket library sends by itself


def tag_of(frame: type[msgspec.Struct]) -> str:
    """The `type` of a frame."""
    return str(frame.__struct_config__.tag)


def sections(level: int) -> dict[str, str]:
    """The text under each heading of a level, by its title."""
    parts = re.split(rf"^{'#' * level} (.+)$", PROTOCOL, flags=re.MULTILINE)
    return {
        title: re.split(rf"^#{{1,{level}}} ", text, flags=re.M)[0]
        for title, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def unwrapped(text: str) -> str:
    """A text as one line: where its lines end says nothing."""
    return " ".join(text.split())


def rows(section: str) -> list[list[str]]:
    """The cells of a section's table, without its head."""
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def tables(section: str) -> list[list[list[str]]]:
    """The cells of each of a section's tables, without its head."""
    return [rows(part) for part in re.findall(r"(?:^\|.+\n)+", section, re.M)]


def documented(heading: str) -> dict[str, bool]:
    """The fields of a table, and whether each may be absent."""
    return {row[0].strip("`"): "optional" in row[2] for row in rows(sections(3)[heading])}


def declared(of: list[FieldInfo]) -> dict[str, bool]:
    """The fields of a struct, and whether each may be absent."""
    return {field.encode_name: not field.required for field in of}


HTTP = sections(2)["Over HTTP"]
FRAME_SECTIONS = {title.strip("`") for title in sections(3) if title.startswith("`")}
EXAMPLES: list[dict[str, Any]] = [
    json.loads(text) for text in re.findall(r"^```json\n(.+?)\n```$", PROTOCOL, re.M | re.S)
]


def test_every_frame_has_a_section_and_no_other_has() -> None:
    assert {tag_of(frame) for frame in CLIENT_FRAMES + SERVER_FRAMES} == FRAME_SECTIONS


def test_frames_stand_under_the_heading_of_who_sends_them() -> None:
    by_heading = {title: re.findall(r"^### `(.+)`$", text, re.M) for title, text in sections(2).items()}
    others = [frame for frame in SERVER_FRAMES if frame not in JOURNAL_FRAMES]
    assert by_heading["Client frames"] == [tag_of(frame) for frame in CLIENT_FRAMES]
    assert by_heading["Server frames from the journal"] == [tag_of(frame) for frame in JOURNAL_FRAMES]
    assert set(by_heading["Server frames not from the journal"]) == {tag_of(frame) for frame in others}


@pytest.mark.parametrize("frame", CLIENT_FRAMES + SERVER_FRAMES, ids=tag_of)
def test_a_frame_has_exactly_the_fields_of_its_table(frame: type[msgspec.Struct]) -> None:
    expected = declared(list(fields(frame)))
    if issubclass(frame, JournalFrame):
        for field in fields(JournalFrame):
            del expected[field.name]
    assert documented(f"`{tag_of(frame)}`") == expected


def test_a_message_and_a_usage_have_exactly_the_fields_of_their_tables() -> None:
    assert documented("A message") == declared(list(fields(Message)))
    assert documented("A usage") == declared(list(fields(Usage)))


def test_every_frame_has_an_example_which_is_that_of_the_asyncapi_document() -> None:
    assert {example["type"] for example in EXAMPLES} == FRAME_SECTIONS
    assert {example["type"]: example for example in EXAMPLES} == FRAMES


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: str(example["type"]))
def test_an_example_is_a_frame(example: dict[str, Any]) -> None:
    if example["type"] in {tag_of(frame) for frame in CLIENT_FRAMES}:
        assert tag_of(type(decode_frame(json.dumps(example)))) == example["type"]
    else:
        # Through the struct and back: what it does not know, or spells otherwise, would not come back.
        assert json.loads(encode(msgspec.convert(example, AnyServerFrame))) == example


def test_every_error_code_is_there_with_whether_to_try_again() -> None:
    words = {True: "yes", False: "no"}
    table = {row[0].strip("`"): row[2] for row in rows(sections(2)["Error codes"])}
    assert table == {
        error.code: "varies" if error is AgentFailed else words[error.retryable] for error in CLIENT_ERRORS
    }


def test_every_close_code_is_there() -> None:
    own = {int(code) for code in errors.CloseCode}
    assert {int(row[0]) for row in rows(sections(2)["Close codes"])} == own | LIBRARY_CLOSE_CODES


FACES = {"Over HTTP": REST, "The AI SDK's clients": AI_SDK, "The Responses API": RESPONSES}


def test_every_operation_stands_in_the_section_of_its_face() -> None:
    assert [operation for face in FACES.values() for operation in face] == list(OPERATIONS)


@pytest.mark.parametrize("heading", FACES)
def test_every_operation_over_http_is_there_with_its_fields(heading: str) -> None:
    listed = next(table for table in tables(sections(2)[heading]) if re.match("`[A-Z]+ /", table[0][0]))
    table = {row[0].strip("`"): set(re.findall(r"`([\w\[\]]+)`", row[1])) for row in listed}
    assert set(table) == {f"{operation.method} {operation.path}" for operation in FACES[heading]}
    for operation in FACES[heading]:
        kinds = [operation.query, *(kind for kind in operation.bodies if kind is not AnyPostedMessage)]
        expected = {field.encode_name for kind in kinds for field in fields(kind)}
        assert table[f"{operation.method} {operation.path}"] == expected, operation.name


def test_every_frame_of_the_ai_sdk_is_there_with_the_fields_that_are_used() -> None:
    ours, theirs = tables(sections(2)["The AI SDK's clients"])[:2]
    documented = {row[0].strip("`"): set(re.findall(r"`(\w+)`", row[1])) for row in ours}
    # The message's own id is in `messages`; what a body may say stands in the last column.
    used = {
        tag_of(frame): {field.encode_name for field in fields(frame)} - {"messageId"} for frame in get_args(AnyFrame)
    }
    assert documented == used
    sent = [ai_sdk.start_frame("r"), ai_sdk.chunk_head("r") + '0,"chunk":{}}', ai_sdk.end_frame("r")]
    sent += [ai_sdk.no_active_frame("r"), ai_sdk.error_frame("r", "no")]
    shown = {row[0].strip("`"): set(re.findall(r"`(\w+)`", row[1])) for row in theirs}
    assert shown == {frame["type"]: frame.keys() - {"type"} for frame in map(json.loads, sent)}


def test_the_limits_of_the_ai_sdk_are_those_of_the_code() -> None:
    section = unwrapped(sections(2)["The AI SDK's clients"])
    assert section.count(f"{ai_sdk.REQUEST_BYTES_MAX:,} bytes") == 2
    assert f"shows at most {connection.FOLLOWS_MAX} turns" in section
    assert f"within {tickets.TICKET_SECONDS:g} seconds" in section
    assert f"at most {tickets.TICKETS_MAX} of a user" in section
    assert f"stops the turn only after {STOP_SECONDS * 1000:g} ms" in section
    assert f"`{ai_sdk.SUBPROTOCOL}`" in section


def test_every_status_over_http_is_there_with_its_codes() -> None:
    table = {row[0]: set(re.findall(r"`([a-z_]+)`", row[1])) - {"user_id", "message_id"} for row in tables(HTTP)[1]}
    known: dict[str, set[str]] = {"405": {"invalid_frame"}}
    for error in HTTP_ERRORS:
        known.setdefault(str(error.http_status), set()).add(error.code)
    assert table == known


def test_the_limits_over_http_are_those_of_the_code() -> None:
    limits = {row[0]: row[1] for row in tables(HTTP)[2]}
    assert limits["a body"].endswith(f"{operations.APPENDED_BYTES_MAX:,} where messages are appended")
    assert limits["messages that are appended at once"] == f"{bodies.MESSAGES_AT_ONCE_MAX}"
    assert limits["calls of a message"] == f"{bodies.TOOL_CALLS_MAX}"
    assert limits["`metadata`"].startswith(f"{conversation_fields.METADATA_BYTES_MAX} bytes of JSON")
    assert limits["messages that are read at once"].startswith(f"{database.READ_BYTES_MAX:,} bytes of content")
    assert limits["seconds for a body to come"] == f"{http.BODY_SECONDS_MAX:g}"
    bodies_at_once = limits["bytes of a user's bodies that a node receives at once"]
    assert bodies_at_once.startswith(f"{shares.READ_BYTES_PER_USER_MAX:,}, then")
    assert f"of all users {shares.READ_BYTES_MAX:,}" in bodies_at_once
    assert f"of a body above {decoding.LONG_BYTES_MIN:,} bytes" in unwrapped(PROTOCOL)


def test_the_limits_are_those_of_the_code() -> None:
    limits = {row[0]: row[1] for row in rows(sections(2)["Limits"])}
    assert limits["fragments of a frame"] == f"{bounded_websocket.FRAGMENTS_MAX}"
    assert limits["frames in a burst"] == f"{allowance.FRAMES_BURST}"
    assert limits["frames per second"] == f"{allowance.FRAMES_PER_SECOND}"
    burst = limits["bytes of a user's frames in a burst, all sockets of a node together"]
    assert burst == f"{allowance.FRAME_BYTES_BURST:,}"
    rate = limits["bytes of a user's frames per second, all sockets of a node together"]
    assert rate == f"{allowance.FRAME_BYTES_PER_SECOND:,}"
    assert f"For one user {HELD_PER_USER_MAX} snapshots" in unwrapped(PROTOCOL)
    assert limits["refused frames of that kind"] == f"{allowance.REFUSALS_MAX}"
    first, long_after = "a frame before the client has authenticated", "the same afterwards, in a burst"
    assert limits[first] == f"{bounded_websocket.FIRST_MESSAGE_BYTES_MAX:,} bytes"
    assert limits[long_after] == f"{bounded_websocket.FRAMES_BURST}"
    assert limits["the same afterwards, per second"] == f"{bounded_websocket.FRAMES_PER_SECOND:g}"
    before = limits["frames of WebSockets before that, with pings, pongs and fragments"]
    rates = bounded_websocket.FIRST_RATES
    assert before == f"{rates.frames_burst}, and {rates.bytes_burst:,} bytes in all"
    slower = "bytes per second, after a burst of twice the longest frame (1,048,576 at least)"
    assert limits[slower] == f"{bounded_websocket.BYTES_PER_SECOND:,.0f}"
    assert f"{bounded_websocket.BYTES_BURST_MIN:,}" in slower
    assert limits["seconds for a frame to come whole"] == f"{bounded_websocket.MESSAGE_SECONDS_MAX:g}"
    in_part = limits["bytes of frames that have come in part, of all connections of a node"]
    assert in_part == f"{peers.UNFINISHED_BYTES_MAX:,}"
    assert limits["TCP connections of a node"].endswith(f"+ {peers.HTTP_CONNECTIONS_MAX}")
    assert limits["lines of a WebSocket's head"] == f"{http11.MAX_NUM_HEADERS}"
    trailers = limits["bytes behind a request's head that are no body (trailers)"]
    assert trailers == f"{bounded_http.TRAILER_BYTES_MAX}"
    assert limits["requests behind one that is not answered yet"] == f"{bounded_http.PIPELINED_MAX}"
    assert limits["conversations that a connection follows"] == f"{connection.FOLLOWS_MAX}"
    assert limits["seconds until authenticated"] == f"{connection.AUTHENTICATION_SECONDS:g}"
    assert limits["seconds without an answer to a protocol ping, sent every 20"] == f"{serve.KEEPALIVE_SECONDS:g}"
    assert (
        limits["seconds for a request's head to come, also that of a WebSocket"] == f"{bounded_http.HEAD_SECONDS_MAX:g}"
    )
    assert limits["bytes of a request's head, or of a line of it"] == f"{bounded_http.HEAD_BYTES_MAX}"
    assert limits["`content`"] == f"`MESSAGE_BYTES_MAX` ({Settings().message_bytes_max:,}) bytes of UTF-8"
    assert f"({6 * Settings().message_bytes_max + 16_384:,} by default)" in limits["a frame"]
    assert f"{connection.EXPIRING_SECONDS:g} seconds before its token's end" in unwrapped(PROTOCOL)


def test_no_frame_is_named_that_does_not_exist() -> None:
    named = set(re.findall(r"`((?:message|conversation|turn|auth)\.[a-z_]+)`", PROTOCOL))
    assert named - {"message.id", "message.status"} <= FRAME_SECTIONS
    assert f"`{SUBPROTOCOL}`" in PROTOCOL
