"""A client of the AI SDK's wires, over a WebSocket and over HTTP, and what its `useChat` would show of their chunks."""

from __future__ import annotations

import asyncio
import copy
import json
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final
from urllib.parse import quote

import aiohttp
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from yarl import URL

from tests.kit.harness import Frame, NodeProcess, sql, token_for
from tests.kit.rest import Reply, Rest

PATH: Final = "/api/chat"
SUBPROTOCOL: Final = "anynode.ai-sdk"
SECONDS_MAX: Final = 15.0
LAST: Final = frozenset({"end", "error", "no-active"})
# The fields that each of the server's frames has, no more and no less.
FIELDS: Final[Mapping[str, frozenset[str]]] = {
    "start": frozenset({"type", "requestId"}),
    "chunk": frozenset({"type", "requestId", "sequence", "chunk"}),
    "end": frozenset({"type", "requestId"}),
    "no-active": frozenset({"type", "requestId"}),
    "error": frozenset({"type", "requestId", "errorText"}),
    "ready": frozenset({"type", "requestId", "node_id", "heartbeat_seconds"}),
    "heartbeat": frozenset({"type", "requestId"}),
}
NO_REQUEST: Final = ""  # the `requestId` of those two
Chunk = dict[str, Any]


def asking(*steps: Sequence[Sequence[Any]]) -> str:
    """The question that the stepping agent answers in these steps, each a list of actions."""
    return json.dumps(steps)


def asking_once(*actions: Sequence[Any]) -> str:
    """The question that it answers with these actions, in one step."""
    return asking(actions)


async def statuses(database_url: str, user: str) -> list[str]:
    """The states of all of the user's turns, in order."""
    rows = await sql(
        database_url,
        "SELECT t.status FROM turns t JOIN conversations c ON c.id = t.conversation_id WHERE c.user_id = $1 "
        "ORDER BY t.created_at",
        user,
    )
    return [row["status"] for row in rows]


def news(request: str) -> list[Frame]:
    """All that a request hears that has waited for something newer."""
    return [{"type": "start", "requestId": request}, {"type": "end", "requestId": request}]


def new_id() -> str:
    """An id that nobody else uses, as the AI SDK's: no UUID."""
    return uuid.uuid4().hex[:16]


def question(text: str, id: str | None = None) -> Frame:
    """What the user says, as a UI message."""
    return {"id": id or new_id(), "role": "user", "parts": [{"type": "text", "text": text}]}


class ChatSocket:
    """A connection of the WebSocket transport: the frames of each request, in the order in which they came. Those of no
    request may only come where the connection `has_heartbeats`."""

    def __init__(self, connection: ClientConnection, *, has_heartbeats: bool = False) -> None:
        self.connection = connection
        self.has_heartbeats = has_heartbeats
        self._waiting: list[Frame] = []

    async def send(self, frame: Mapping[str, Any] | str) -> None:
        """Send a frame, or text as it is. Raises EOFError where the server has closed."""
        try:
            await self.connection.send(frame if isinstance(frame, str) else json.dumps(frame))
        except ConnectionClosed as closed:
            raise EOFError(str(closed)) from closed

    async def ask(
        self,
        chat_id: str,
        text: str,
        *,
        message_id: str | None = None,
        request_id: str | None = None,
        trigger: str = "submit-message",
        before: Sequence[Frame] = (),
        headers: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> str:
        """Send a question behind some history; returns the request's id."""
        request_id = request_id or new_id()
        frame = {
            "type": "send",
            "requestId": request_id,
            "id": chat_id,
            "trigger": trigger,
            "messages": [*before, question(text, message_id)],
            "headers": dict(headers or {}),
            "body": dict(body or {}),
        }
        await self.send(frame | fields)
        return request_id

    async def resume(
        self,
        chat_id: str,
        last_sequence: int | None = None,
        *,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> str:
        """Ask for a chat's turn; returns the request's id."""
        request_id = request_id or new_id()
        frame = {
            "type": "resume",
            "requestId": request_id,
            "id": chat_id,
            "headers": dict(headers or {}),
            "body": dict(body or {}),
        }
        await self.send(frame if last_sequence is None else {**frame, "lastSequence": last_sequence})
        return request_id

    async def wait(self, chat_id: str, last_id: str, *, request_id: str | None = None) -> str:
        """Wait until a chat has something newer than a message; returns the request's id."""
        return await self.resume(chat_id, request_id=request_id, body={"wait_after": last_id})

    async def abort(self, request_id: str) -> None:
        """Stop what a request shows."""
        await self.send({"type": "abort", "requestId": request_id})

    async def next(self, request_id: str, *, within_seconds: float = SECONDS_MAX) -> Frame:
        """The request's next frame; those of others are kept for them."""
        async with asyncio.timeout(within_seconds):
            while True:
                for number, frame in enumerate(self._waiting):
                    if frame["requestId"] == request_id:
                        return self._waiting.pop(number)
                self._waiting.append(await self._receive())

    async def until(self, request_id: str, type: str, *, within_seconds: float = SECONDS_MAX) -> list[Frame]:
        """The request's frames up to the first chunk of a type."""
        frames: list[Frame] = []
        while not frames or frames[-1].get("chunk", {}).get("type") != type:
            assert not frames or frames[-1]["type"] not in LAST, frames
            frames.append(await self.next(request_id, within_seconds=within_seconds))
        return frames

    async def rest(self, request_id: str, *, within_seconds: float = SECONDS_MAX) -> list[Frame]:
        """The request's frames up to its last one."""
        frames: list[Frame] = []
        while not frames or frames[-1]["type"] not in LAST:
            frames.append(await self.next(request_id, within_seconds=within_seconds))
        return frames

    async def answer(self, chat_id: str, text: str, **fields: Any) -> list[Chunk]:
        """Ask, and take the whole answer's chunks."""
        return chunks_of(await self.rest(await self.ask(chat_id, text, **fields)))

    async def replay(self, chat_id: str, last_sequence: int | None = None) -> list[Chunk]:
        """Resume, and take the chunks up to the turn's end."""
        frames = await self.rest(await self.resume(chat_id, last_sequence))
        assert frames[0]["type"] == "start", frames
        return chunks_of(frames[1:], after=-1 if last_sequence is None else last_sequence)

    async def refused(self, request_id: str) -> str:
        """Why the request is refused, which is all that it hears."""
        (frame,) = await self.rest(request_id)
        assert frame["type"] == "error", frame
        text: str = frame["errorText"]
        assert text
        return text

    def left(self, request_id: str | None = None) -> list[Frame]:
        """What has come and was not taken, of a request or of all."""
        return [frame for frame in self._waiting if request_id in (None, frame["requestId"])]

    async def sync(self) -> None:
        """Wait until the server has taken all frames so far: it answers a request for a chat that is not there."""
        frame = await self.next(await self.resume(f"no such chat {new_id()}"))
        assert frame["type"] == "no-active"

    async def closed(self, *, within_seconds: float = SECONDS_MAX) -> tuple[int, str]:
        """Wait for the server to close; returns its code and the reason."""
        async with asyncio.timeout(within_seconds):
            while True:
                try:
                    self._waiting.append(await self._receive())
                except EOFError:
                    break
        assert self.connection.close_code is not None
        return self.connection.close_code, self.connection.close_reason or ""

    def drop(self) -> None:
        """Vanish without a closing handshake."""
        self.connection.transport.abort()

    async def _receive(self) -> Frame:
        try:
            text = await self.connection.recv()
        except ConnectionClosed as closed:
            raise EOFError(str(closed)) from closed
        frame: Frame = json.loads(text)
        assert frame.keys() == FIELDS[frame["type"]], frame
        is_of_none = frame["type"] in ("ready", "heartbeat")
        assert (frame["requestId"] == NO_REQUEST) == is_of_none <= self.has_heartbeats, frame
        return frame


@asynccontextmanager
async def chat_socket(
    node: NodeProcess,
    user: str | None = "ada",
    *,
    token: str | None = None,
    subprotocols: Sequence[str] = (SUBPROTOCOL,),
    query: str = "",
    headers: Mapping[str, str] | None = None,
) -> AsyncIterator[ChatSocket]:
    """A connection of a user by the handshake's header (`user` None: by nothing but what is given)."""
    all_headers = dict(headers or {})
    if token or user:
        all_headers["Authorization"] = f"Bearer {token or token_for(str(user))}"
    connection = await connect(
        node.ws + PATH + query,
        subprotocols=subprotocols or None,  # type: ignore[arg-type]
        additional_headers=all_headers,
        compression=None,
        max_size=None,
        proxy=None,
        close_timeout=2,
    )
    try:
        yield ChatSocket(connection, has_heartbeats="heartbeats=true" in query)
    finally:
        await connection.close()


def chunks_of(frames: Sequence[Frame], *, after: int = -1) -> list[Chunk]:
    """The chunks of a turn that was shown to its end, numbered without a gap from behind a number on."""
    assert frames[-1]["type"] == "end", frames[-1]
    return begun_of(frames[:-1], after=after)


def begun_of(frames: Sequence[Frame], *, after: int = -1) -> list[Chunk]:
    """The chunks of frames that are nothing else, numbered without a gap from behind a number on."""
    assert [frame["type"] for frame in frames] == ["chunk"] * len(frames), frames
    assert [frame["sequence"] for frame in frames] == list(range(after + 1, after + 1 + len(frames)))
    return [frame["chunk"] for frame in frames]


class Stream:
    """A UI message stream over HTTP that is open."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        self.is_done = False
        self.heartbeats = 0
        self.chunks: list[Chunk] = []  # all that have come
        self._read = b""

    async def next(self, *, within_seconds: float = SECONDS_MAX) -> Chunk | None:
        """The next chunk; None: the stream has come to its end, which it says with `[DONE]`."""
        async with asyncio.timeout(within_seconds):
            while True:
                event = await self._event()
                if event is None:
                    assert self.is_done, "the stream has ended without [DONE]"
                    return None
                assert not self.is_done, f"after [DONE] comes {event!r}"
                if event.startswith(":"):
                    self.heartbeats += 1
                    continue
                assert event.startswith("data: "), event
                assert "\n" not in event
                if event == "data: [DONE]":
                    self.is_done = True
                    continue
                chunk: Chunk = json.loads(event.removeprefix("data: "))
                self.chunks.append(chunk)
                return chunk

    async def until(self, *types: str) -> list[Chunk]:
        """The chunks up to the first of one of these types."""
        chunks: list[Chunk] = []
        while not chunks or chunks[-1]["type"] not in types:
            chunk = await self.next()
            assert chunk is not None, f"the stream has ended after {chunks}"
            chunks.append(chunk)
        return chunks

    async def rest(self) -> list[Chunk]:
        """The chunks up to the end of the stream."""
        chunks = []
        while (chunk := await self.next()) is not None:
            chunks.append(chunk)
        return chunks

    async def broken(self) -> list[Chunk]:
        """The chunks up to where the stream is broken off, which no client can take for its end."""
        chunks = []
        try:
            while (chunk := await self.next()) is not None:
                chunks.append(chunk)
        except aiohttp.ClientPayloadError:
            assert not self.is_done
            return chunks
        raise AssertionError(f"the stream has ended as if it were whole, after {chunks}")

    def drop(self) -> None:
        """Vanish."""
        assert self.response.connection is not None
        assert self.response.connection.transport is not None
        self.response.connection.transport.abort()

    async def _event(self) -> str | None:
        while b"\n\n" not in self._read:
            piece = await self.response.content.readany()
            if not piece:
                assert not self._read, f"an event was cut: {self._read!r}"
                return None
            self._read += piece
        event, _, self._read = self._read.partition(b"\n\n")
        return event.decode()


def chat_path(chat_id: str, what: str) -> str:
    """The path of an operation on a chat."""
    return f"{PATH}/{quote(chat_id, safe='')}/{what}"


def request_of(chat_id: str, text: str, message_id: str | None = None, **fields: Any) -> Frame:
    """The body of a question over HTTP."""
    return {"id": chat_id, "messages": [question(text, message_id)], "trigger": "submit-message", **fields}


@asynccontextmanager
async def posted(
    rest: Rest, chat_id: str, text: str, message_id: str | None = None, **fields: Any
) -> AsyncIterator[Stream]:
    """Ask over HTTP."""
    async with _stream(rest, "POST", PATH, json=request_of(chat_id, text, message_id, **fields)) as stream:
        yield stream


@asynccontextmanager
async def resumed(rest: Rest, chat_id: str) -> AsyncIterator[Stream]:
    """Resume over HTTP, where there is something."""
    async with _stream(rest, "GET", chat_path(chat_id, "stream")) as stream:
        yield stream


async def replayed(rest: Rest, chat_id: str) -> list[Chunk]:
    """The chunks of a chat's turn over HTTP."""
    async with resumed(rest, chat_id) as stream:
        return await stream.rest()


async def answered(rest: Rest, chat_id: str, text: str, message_id: str | None = None, **fields: Any) -> list[Chunk]:
    """Ask over HTTP, and take the whole answer."""
    async with posted(rest, chat_id, text, message_id, **fields) as stream:
        return await stream.rest()


async def stopped(rest: Rest, chat_id: str) -> Reply:
    """Stop over HTTP."""
    return await rest.ask("POST", chat_path(chat_id, "stop"))


async def messages_of(rest: Rest, chat_id: str, **query: Any) -> list[Frame]:
    """The messages of a chat."""
    messages: list[Frame] = (await rest.ask("GET", chat_path(chat_id, "messages"), query=query)).expect(200)["messages"]
    return messages


async def ticket_of(rest: Rest) -> str:
    """A ticket."""
    return str((await rest.ask("POST", "/auth/ticket")).expect(201)["ticket"])


@asynccontextmanager
async def _stream(rest: Rest, method: str, path: str, **arguments: Any) -> AsyncIterator[Stream]:
    async with rest.session.request(
        method,
        URL(rest.node.http + path, encoded=True),
        headers={"Authorization": f"Bearer {rest.token}"},
        **arguments,
    ) as response:
        assert response.status == 200, await response.text()
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert response.headers["x-vercel-ai-ui-message-stream"] == "v1"
        assert response.headers["Cache-Control"] == "no-store"
        assert response.headers["X-Accel-Buffering"] == "no"
        try:
            yield Stream(response)
        finally:
            response.close()


class Shown:
    """The message that `useChat` shows, made of chunks one by one with the rules of the AI SDK's own reducer. A chunk
    that it would not understand is an error."""

    def __init__(self) -> None:
        self.id: str | None = None
        self.metadata: dict[str, Any] = {}
        self.parts: list[dict[str, Any]] = []
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.is_aborted = False
        self._texts: dict[str, dict[str, Any]] = {}  # those that are open, by their ids

    def take(self, chunk: Chunk) -> None:
        """One chunk more."""
        assert self.finish_reason is None, f"after the end comes {chunk}"
        assert self.error is None, f"after the error comes {chunk}"
        assert not self.is_aborted, f"after the abort comes {chunk}"
        match chunk:
            case {"type": "start", "messageId": id, **rest}:
                assert not rest
                assert self.id is None, "it begins twice"
                self.id = id
            case {"type": "start-step", **rest}:
                assert not rest
                assert not self._texts, "a step begins in a text"
                self.parts.append({"type": "step-start"})
            case {"type": "finish-step", **rest}:
                assert not rest
                assert not self._texts, "a step ends in a text"
            case {"type": "reset-step", **rest}:
                assert not rest
                self._texts.clear()
                while self.parts and self.parts[-1]["type"] != "step-start":
                    self.parts.pop()
            case {"type": "text-start", "id": id, **rest}:
                assert not rest
                assert id not in self._texts, "a text begins twice"
                self._texts[id] = {"type": "text", "text": "", "state": "streaming"}
                self.parts.append(self._texts[id])
            case {"type": "text-delta", "id": id, "delta": delta, **rest}:
                assert not rest
                assert delta
                self._texts[id]["text"] += delta
            case {"type": "text-end", "id": id, **rest}:
                assert not rest
                self._texts.pop(id)["state"] = "done"
            case {
                "type": "tool-input-available",
                "toolCallId": id,
                "toolName": name,
                "input": given,
                "dynamic": True,
                "providerExecuted": True,
                **rest,
            }:
                assert not rest
                assert self._call(id, in_step=True) is None, "a call is made twice in a step"
                part = {"type": "dynamic-tool", "toolName": name, "toolCallId": id, "state": "input-available"}
                self.parts.append(part | {"input": given, "providerExecuted": True})
            case {"type": "tool-output-available", "toolCallId": id, "output": output}:
                self._answer(chunk, {"state": "output-available", "output": output})
            case {"type": "tool-output-error", "toolCallId": id, "errorText": text}:
                self._answer(chunk, {"state": "output-error", "errorText": text})
            case {"type": "finish", "finishReason": reason, "messageMetadata": metadata, **rest}:
                assert not rest
                self._end()
                self.finish_reason = reason
                self.metadata |= metadata
            case {"type": "abort", **rest}:
                assert not rest
                self._end()
                self.is_aborted = True
            case {"type": "error", "errorText": text, **rest}:
                assert not rest
                self._end()
                self.error = text
            case _:
                raise AssertionError(f"no chunk that a client expects: {chunk}")

    @property
    def text(self) -> str:
        """All of its text."""
        return "".join(part["text"] for part in self.parts if part["type"] == "text")

    @property
    def is_over(self) -> bool:
        """Whether nothing more may come."""
        return self.finish_reason is not None or self.error is not None or self.is_aborted

    @property
    def calls(self) -> list[dict[str, Any]]:
        """The parts that are calls of tools."""
        return [part for part in self.parts if part["type"] == "dynamic-tool"]

    def snapshot(self) -> dict[str, Any]:
        """All that can be seen of it."""
        seen = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return copy.deepcopy(seen)

    def _end(self) -> None:
        assert self.id is not None
        assert not self._texts, "it ends in a text"
        assert all(part["state"] != "input-available" for part in self.calls), "a call has no answer"

    def _answer(self, chunk: Chunk, outcome: Mapping[str, Any]) -> None:
        known = {"type", "toolCallId", "output", "errorText", "dynamic", "providerExecuted"}
        assert chunk.keys() <= known
        assert chunk["providerExecuted"] is True
        part = self._call(chunk["toolCallId"], in_step=True) or self._call(chunk["toolCallId"], in_step=False)
        assert part is not None, f"the answer of a call that is not there: {chunk}"
        assert part["state"] == "input-available", f"a call is answered twice: {chunk}"
        part.update(outcome)

    def _call(self, id: str, *, in_step: bool) -> dict[str, Any] | None:
        found: dict[str, Any] | None = None
        for part in self.parts:
            if in_step and part["type"] == "step-start":
                found = None
            elif part["type"] == "dynamic-tool" and part["toolCallId"] == id:
                found = part
        return found


def shown(chunks: Sequence[Chunk]) -> Shown:
    """What a client shows after these chunks."""
    message = Shown()
    for chunk in chunks:
        message.take(chunk)
    return message


def steps_of(parts: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The text and the calls of each step, whatever the order of the two in it. Steps with nothing in them are left
    out."""
    steps: list[tuple[str, list[dict[str, Any]]]] = []
    for part in parts:
        match part["type"]:
            case "step-start":
                steps.append(("", []))
            case "text":
                steps[-1] = (steps[-1][0] + part["text"], steps[-1][1])
            case "dynamic-tool":
                steps[-1][1].append(dict(part))
    return [step for step in steps if step != ("", [])]
