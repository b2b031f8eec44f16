"""A client of the operations over HTTP: one user's requests to a node, and a conversation's events as they come."""

from __future__ import annotations

import asyncio
import io
import json
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
from yarl import URL

from tests.kit.harness import Frame, NodeProcess, token_for

REQUEST_SECONDS_MAX: Final = 40.0
EVENT_SECONDS_MAX: Final = 15.0
MISSING: Final = "0199aa10-5f3e-7c51-9b1d-2f5b6f0a7c11"  # the id of nothing
Event = tuple[int | None, Frame]


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, as it came."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The decoded body."""
        return json.loads(self.body)

    @property
    def refusal(self) -> tuple[int, str]:
        """Status and code of an error, whose shape is checked."""
        assert self.headers["Content-Type"] == "application/json", self
        error = self.json["error"]
        assert self.json.keys() == {"error"}
        ids = {"conversation_id", "message_id"}  # where the question had been admitted by then
        limits = {"limit", "limit_max", "retry_after_ms"} if error["code"] == "rate_limited" else set()
        assert {"code", "message"} <= error.keys() <= {"code", "message", "details"} | ids | limits
        assert isinstance(error["message"], str)
        assert error["message"]
        return self.status, error["code"]

    @property
    def message(self) -> str:
        """What an error says to people."""
        return str(self.json["error"]["message"])

    @property
    def paths(self) -> list[str]:
        """Where an error says that something is wrong."""
        return [detail["path"] for detail in self.json["error"]["details"]]

    def expect(self, status: int) -> Any:
        """The body, which must have come with this status."""
        assert self.status == status, self
        return self.json if self.body else None


class Events:
    """A stream of Server-Sent Events that is open."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        self.last_event_id: int | None = None
        self.retry_milliseconds: int | None = None
        self.heartbeats = 0
        self._read = bytearray()

    async def next(self, *, within_seconds: float = EVENT_SECONDS_MAX) -> Event | None:
        """The next event that is not a heartbeat, with its own id; None: the stream has ended, at an event's end."""
        async with asyncio.timeout(within_seconds):
            while (event := await self._next()) is not None:
                if event[1]["type"] != "heartbeat":
                    return event
                assert event[0] is None
                self.heartbeats += 1
            return None

    async def until(self, *types: str) -> list[Event]:
        """The events up to the first of one of these types, that one included."""
        events: list[Event] = []
        while not events or events[-1][1]["type"] not in types:
            event = await self.next()
            assert event is not None, f"the stream has ended after {events}"
            events.append(event)
        return events

    async def rest(self) -> list[Event]:
        """The events up to the end of the stream."""
        events = []
        while (event := await self.next()) is not None:
            events.append(event)
        return events

    def drop(self) -> None:
        """Vanish."""
        assert self.response.connection is not None
        assert self.response.connection.transport is not None
        self.response.connection.transport.abort()

    async def heartbeat(self) -> None:
        """Wait for one more; nothing else may come."""
        async with asyncio.timeout(EVENT_SECONDS_MAX):
            assert await self._next() == (None, {"type": "heartbeat"})
        self.heartbeats += 1

    async def _next(self) -> Event | None:
        id: int | None = None
        data: list[str] = []
        while True:
            line = (await self._line()).decode()
            if not line:
                assert not data, "an event was cut"
                return None
            field, _, value = line[:-1].partition(": ")
            match field:
                case "":
                    if data:
                        self.last_event_id = self.last_event_id if id is None else id
                        return id, json.loads("\n".join(data))
                case "id":
                    id = int(value)
                case "data":
                    data.append(value)
                case "retry":
                    self.retry_milliseconds = int(value)
                case _:
                    raise AssertionError(f"no field of an event: {line!r}")

    async def _line(self) -> bytes:
        """The next line, however long; nothing at the end."""
        searched = 0
        while (end := self._read.find(b"\n", searched) + 1) == 0:
            searched = len(self._read)
            piece = await self.response.content.readany()
            if not piece:
                assert not self._read, "a line was cut"
                return b""
            self._read += piece
        line = bytes(self._read[:end])
        del self._read[:end]
        return line


class Rest:
    """One user's client of one node."""

    def __init__(self, session: aiohttp.ClientSession, node: NodeProcess, token: str | None) -> None:
        self.session = session
        self.node = node
        self.token = token

    async def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        data: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, Any] | None = None,
    ) -> Reply:
        """Ask for something; `path` goes as it is written, `data` too."""
        if body is not None:
            data = json.dumps(body).encode()
        url = URL(self.node.http + path, encoded=True)
        async with self.session.request(
            method,
            url.update_query({name: str(value) for name, value in query.items()}) if query else url,
            data=None if data is None else io.BytesIO(data),
            headers={**self._authorization(), **(headers or {})},
            allow_redirects=False,
        ) as response:
            return Reply(response.status, response.headers.copy(), await response.read())

    async def get(self, path: str, **query: Any) -> Reply:
        """GET."""
        return await self.ask("GET", path, query=query)

    async def post(self, path: str, body: Any = None) -> Reply:
        """POST."""
        return await self.ask("POST", path, body)

    async def create(self, **fields: Any) -> str:
        """Make a conversation; returns its id."""
        return str((await self.post("/conversations", fields)).expect(201)["id"])

    async def append(self, conversation_id: str, *messages: Mapping[str, Any]) -> Reply:
        """Append one message as such, or several."""
        body = messages[0] if len(messages) == 1 else {"messages": messages}
        return await self.post(f"/conversations/{conversation_id}/messages", body)

    async def proceed(self, conversation_id: str, content: str, **fields: Any) -> Reply:
        """`continue`."""
        return await self.post(f"/conversations/{conversation_id}/continue", {"content": content, **fields})

    async def messages(self, conversation_id: str, **query: Any) -> list[dict[str, Any]]:
        """The newest messages, or those that the query asks for."""
        messages: list[dict[str, Any]] = (await self.get(f"/conversations/{conversation_id}/messages", **query)).expect(
            200
        )["messages"]
        return messages

    @asynccontextmanager
    async def events(
        self, conversation_id: str, after: int | None = None, *, last_event_id: int | str | None = None
    ) -> AsyncIterator[Events]:
        """Follow a conversation."""
        headers = self._authorization()
        if last_event_id is not None:
            headers["Last-Event-ID"] = str(last_event_id)
        async with self.session.get(
            f"{self.node.http}/conversations/{conversation_id}/events",
            params={} if after is None else {"after": str(after)},
            headers=headers,
        ) as response:
            assert response.status == 200, await response.text()
            assert response.content_type == "text/event-stream"
            try:
                yield Events(response)
            finally:
                response.close()

    def _authorization(self) -> dict[str, str]:
        return {} if self.token is None else {"Authorization": f"Bearer {self.token}"}


@asynccontextmanager
async def rest_to(
    node: NodeProcess, user: str | None, *, token: str | None = None, is_narrow: bool = False
) -> AsyncIterator[Rest]:
    """A client with a user's token, or another token, or none (`user` None). A narrow one holds little of what has come
    and was not yet read."""
    timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS_MAX)
    connector = aiohttp.TCPConnector(limit=0, socket_factory=_narrow_socket if is_narrow else None)
    bytes_max = 1024 if is_narrow else 65_536
    async with aiohttp.ClientSession(timeout=timeout, connector=connector, read_bufsize=bytes_max) as session:
        yield Rest(session, node, token or (None if user is None else token_for(user)))


def _narrow_socket(info: Any) -> socket.socket:
    family, kind, protocol, _, _ = info
    narrow = socket.socket(family, kind, protocol)
    narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    return narrow


def frames_of(events: Sequence[Event]) -> list[Frame]:
    """The frames, whose ids must be their seqs."""
    for id, frame in events:
        assert id == frame.get("seq"), frame
    return [frame for _, frame in events]
