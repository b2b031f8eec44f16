"""Streams of server-sent events: written to their end, or cut by a client, a drain or the end of a token."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from starlette.types import Message

from anynode.server.engine.node import Node
from anynode.server.errors import ClientError, NotFound
from anynode.server.transport import sse
from anynode.server.transport.http import BREAK_OFF
from anynode.server.transport.sse import EventStream, or_silence, sse_data
from tests.kit.asgi import WAIT_SECONDS_MAX, Peer, http_scope
from tests.kit.turns import node_with, request_of

GONE: Message = {"type": "http.disconnect"}
FAR = 4e9  # a time that no test lives to see, Unix seconds


class Pieces:
    """What a stream writes: some pieces, then an error, its end, or nothing more."""

    def __init__(self, *pieces: bytes, then: Exception | None = None, stays: bool = False) -> None:
        self.is_closed = False
        self.end = asyncio.Event()
        self._pieces = pieces
        self._then = then
        if not stays:
            self.end.set()

    async def run(self) -> AsyncGenerator[bytes, None]:
        try:
            for piece in self._pieces:
                yield piece
            await self.end.wait()
            if self._then is not None:
                raise self._then
        finally:
            self.is_closed = True


class Streaming:
    """A stream that runs, its node and its client. `broken_off` says whether the connection was closed."""

    def __init__(self, pieces: Pieces, *, expires_at: float = FAR, method: str = "GET", **options: Any) -> None:
        self.node: Node = node_with()
        self.peer = Peer()
        self.pieces = pieces
        self.broken_off = False
        self.request = request_of(self.peer, expires_at=expires_at)
        stream = EventStream(
            node=self.node,
            request=self.request,
            pieces=pieces.run(),
            last_words=self._last_words,
            heartbeat_seconds=options.pop("heartbeat_seconds", 60.0),
            **options,
        )
        scope = http_scope(method, "/", more={BREAK_OFF: self._break_off})
        self._task = asyncio.create_task(stream(scope, self.peer.receive, self.peer.send))

    def _break_off(self) -> None:
        self.broken_off = True
        self.peer.say(GONE)

    def _last_words(self, error: ClientError) -> bytes:
        return f"last words: {error.code}".encode()

    async def ended(self) -> None:
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            await self._task

    async def wrote(self, body: bytes) -> None:
        await self.peer.wait_sent(lambda sent: self.peer.body == body)


# One event.


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, b"data: {}\n\n"),
        ({"id": 0}, b"id: 0\ndata: {}\n\n"),
        ({"event": "error"}, b"event: error\ndata: {}\n\n"),
        ({"id": 7, "event": "error"}, b"id: 7\nevent: error\ndata: {}\n\n"),
    ],
)
def test_an_event_is_a_line_of_data_with_what_belongs_to_it(options: dict[str, Any], expected: bytes) -> None:
    assert sse_data("{}", **options) == expected


# Items, or silence.


async def test_items_come_through_and_the_source_is_closed() -> None:
    pieces = Pieces(b"a", b"b")
    assert [item async for item in or_silence(pieces.run(), 60.0)] == [b"a", b"b"]
    assert pieces.is_closed


async def test_silence_is_told_again_and_again_and_no_item_is_lost_to_it() -> None:
    pieces = Pieces(b"a", stays=True)
    heard: list[bytes | None] = []
    async for item in or_silence(pieces.run(), 0.001):
        heard.append(item)
        if heard.count(None) == 2:
            pieces.end.set()
    assert heard[0] == b"a"
    assert heard.count(None) >= 2
    assert heard.count(b"a") == 1


async def test_an_error_of_the_source_comes_through() -> None:
    with pytest.raises(NotFound):
        _ = [item async for item in or_silence(Pieces(b"a", then=NotFound()).run(), 60.0)]


async def test_a_source_is_closed_when_its_reader_stops_in_the_middle() -> None:
    pieces = Pieces(b"a", stays=True)
    reader = or_silence(pieces.run(), 0.001)
    assert await anext(reader) == b"a"
    assert await anext(reader) is None
    await reader.aclose()
    assert pieces.is_closed


# A whole stream.


@pytest.mark.parametrize("must_be_whole", [True, False])
async def test_a_stream_is_written_to_its_end(must_be_whole: bool) -> None:
    streaming = Streaming(Pieces(b"a", b"", b"b"), headers=[(b"x-a", b"b")], must_be_whole=must_be_whole)
    await streaming.ended()
    peer = streaming.peer
    assert peer.status == 200
    assert peer.headers == {
        "content-type": "text/event-stream; charset=utf-8",
        "cache-control": "no-store",
        "x-accel-buffering": "no",
        "x-a": "b",
    }
    assert [message["body"] for message in peer.sent[1:]] == [b"a", b"b", b""]  # an empty piece would be no event
    assert peer.is_whole
    assert not streaming.broken_off
    assert streaming.pieces.is_closed


async def test_a_head_request_gets_the_headers_alone() -> None:
    streaming = Streaming(Pieces(b"a"), method="HEAD")
    await streaming.ended()
    assert streaming.peer.status == 200
    assert (streaming.peer.body, streaming.peer.is_whole) == (b"", True)
    assert not streaming.broken_off


@pytest.mark.parametrize(("options", "beat"), [({}, b": \n\n"), ({"heartbeat": b"data: 1\n\n"}, b"data: 1\n\n")])
async def test_heartbeats_come_while_there_is_nothing_to_write(options: dict[str, Any], beat: bytes) -> None:
    streaming = Streaming(Pieces(b"a", stays=True), heartbeat_seconds=0.001, **options)
    await streaming.wrote(b"a" + beat + beat)
    streaming.pieces.end.set()
    await streaming.ended()
    assert streaming.peer.is_whole


# A stream that ends with an error.


@pytest.mark.parametrize("must_be_whole", [True, False])
@pytest.mark.parametrize(("error", "code"), [(NotFound(), b"not_found"), (KeyError("broken"), b"internal_error")])
async def test_an_error_is_told_in_the_last_words_and_a_turn_that_is_not_whole_breaks_off(
    must_be_whole: bool, error: Exception, code: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.CRITICAL):
        streaming = Streaming(Pieces(b"a", then=error), must_be_whole=must_be_whole)
        await streaming.ended()
    assert streaming.peer.body == b"alast words: " + code
    assert streaming.peer.is_whole != must_be_whole
    assert streaming.broken_off == must_be_whole


# A stream that is cut.


@pytest.mark.parametrize("must_be_whole", [True, False])
async def test_a_stream_ends_when_its_client_goes(must_be_whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "LAST_WORDS_SECONDS", 0.001)
    streaming = Streaming(Pieces(b"a", stays=True), must_be_whole=must_be_whole)
    await streaming.wrote(b"a")
    streaming.peer.is_gone = must_be_whole  # the end of the other kind is still written
    streaming.peer.say(GONE)
    await streaming.ended()
    assert streaming.pieces.is_closed
    assert streaming.peer.body == b"a"


@pytest.mark.parametrize("must_be_whole", [True, False])
async def test_a_stream_ends_with_its_clients_token(must_be_whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "LAST_WORDS_SECONDS", 0.001)
    streaming = Streaming(Pieces(b"a", stays=True), expires_at=time.time() - 1, must_be_whole=must_be_whole)
    await streaming.ended()
    assert streaming.peer.body in (b"", b"a")  # the token has run out before, so nothing may have come
    assert streaming.peer.is_whole != must_be_whole
    assert streaming.broken_off == must_be_whole


async def test_a_stream_of_a_conversation_ends_when_the_node_begins_to_drain() -> None:
    streaming = Streaming(Pieces(b"a", stays=True), must_be_whole=False)
    await streaming.wrote(b"a")
    streaming.node.draining.set()
    await streaming.ended()
    assert streaming.peer.is_whole
    assert not streaming.broken_off


async def test_a_stream_of_a_turn_goes_on_while_the_node_drains_and_breaks_off_when_it_has_drained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sse, "LAST_WORDS_SECONDS", 0.001)
    streaming = Streaming(Pieces(b"a", stays=True), heartbeat_seconds=0.001)
    streaming.node.draining.set()
    await streaming.peer.wait_sent(lambda sent: streaming.peer.body.count(b": \n\n") == 2)
    assert not streaming.broken_off
    streaming.node.drained.set()
    await streaming.ended()
    assert streaming.broken_off
    assert not streaming.peer.is_whole


async def test_the_end_of_a_turn_that_a_drain_has_waited_for_is_still_written() -> None:
    streaming = Streaming(Pieces(b"a", stays=True))
    await streaming.wrote(b"a")
    streaming.node.drained.set()
    for _ in range(5):
        await asyncio.sleep(0)
    streaming.pieces.end.set()  # within LAST_WORDS_SECONDS
    await streaming.ended()
    assert streaming.peer.is_whole
    assert not streaming.broken_off


async def test_after_a_long_piece_a_stream_waits_until_its_client_has_read_it() -> None:
    streaming = Streaming(Pieces(b"x" * 65_537, b"y", stays=True))
    await streaming.wrote(b"x" * 65_537 + b"y")
    assert [message["body"][:1] for message in streaming.peer.sent[1:]] == [b"x", b"", b"y"]
    streaming.peer.say(GONE)
    await streaming.ended()


@pytest.mark.parametrize("must_be_whole", [True, False])
async def test_a_stream_whose_token_is_revoked_ends_as_where_the_token_runs_out(
    monkeypatch: pytest.MonkeyPatch, must_be_whole: bool
) -> None:
    monkeypatch.setattr(sse, "LAST_WORDS_SECONDS", 0.0)
    streaming = Streaming(Pieces(b"x", stays=True), must_be_whole=must_be_whole)
    await streaming.wrote(b"x")
    streaming.request.revoked.set()
    await streaming.ended()
    assert streaming.pieces.is_closed
    assert streaming.broken_off == must_be_whole
    assert streaming.peer.is_whole != must_be_whole
