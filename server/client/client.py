"""A client of the native protocol that reconnects and resumes by itself.

The terminal chat uses it, and it shows what every client has to do.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Final

import websockets
from websockets.asyncio.client import ClientConnection, connect

from anynode.models.rules import TERMINAL_TYPES
from anynode.server.errors import CloseCode
from anynode.server.protocol.frames import SUBPROTOCOL

BACKOFF_SECONDS: Final = (0.05, 2.0)  # the first and the longest wait between attempts

INBOX_FRAMES: Final = 1000  # frames that have come and were not asked for yet

Frame = dict[str, Any]


class Refused(Exception):
    """The server refused the request, and would refuse it again; `code` and `message` are the server's."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{message} ({code})")
        self.code = code
        self.message = message


class GivenUp(Exception):
    """No node could be reached within the client's `patience_seconds`."""


class Client:
    """A client for one user, which reconnects to the nodes at `urls` in turn and resumes where it was.

    Use it as an async context manager, for one turn at a time. `urls` are base URLs such as ws://127.0.0.1:8000.
    `on_status` is called with a text when the connection changes.
    """

    def __init__(
        self,
        urls: Sequence[str],
        token: str,
        *,
        patience_seconds: float = 60.0,
        on_status: Callable[[str], object] = lambda text: None,
    ) -> None:
        self.node_id = ""
        self._urls = [url.rstrip("/") + "/ws" for url in urls]
        self._token = token
        self._patience_seconds = patience_seconds
        self._on_status = on_status
        self._connection: ClientConnection | None = None
        self._reader: asyncio.Task[None] | None = None
        self._inbox: asyncio.Queue[Frame | Exception] = asyncio.Queue()
        self._heartbeat_seconds = 10.0

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *exception: object) -> None:
        if self._connection is not None and self._reader is not None:
            self._reader.cancel()  # it may be waiting for room in the inbox
            await self._connection.close()

    async def send(
        self,
        content: str,
        *,
        conversation_id: str | None = None,
        message_id: str | None = None,
        if_busy: str = "reject",
    ) -> AsyncGenerator[Frame, None]:
        """Send a message and yield the frames of its turn up to the end, however often the connection breaks.
        Raises Refused or GivenUp."""
        message_id = message_id or str(uuid.uuid4())
        frame = {"type": "message.send", "message_id": message_id, "content": content, "if_busy": if_busy}
        turn_id: str | None = None
        created: Frame | None = None
        frame["request_id"] = message_id

        def opening(cursors: Mapping[str, int]) -> Frame:
            # The same message_id again finds the turn that it has; once its events come, the cursor is better.
            if turn_id is not None and conversation_id is not None:
                after = cursors[conversation_id]
                return {"type": "conversation.follow", "conversation_id": conversation_id, "after": after}
            return frame | ({"conversation_id": conversation_id} if conversation_id else {})

        async with aclosing(self._frames(opening)) as frames:
            async for received in frames:
                match received["type"]:
                    case "message.created":
                        created = received
                    case "turn.started" if received["message_id"] == message_id:
                        turn_id, conversation_id = received["turn_id"], received["conversation_id"]
                        if created is not None:
                            yield created
                        yield received
                    case "conversation.snapshot" if received["conversation_id"] == conversation_id or turn_id is None:
                        conversation_id = received["conversation_id"]
                        turn_id = turn_id or _turn_of(received, content)
                        yield received
                        if turn_id is not None and (ending := _ending_in(received, turn_id)) is not None:
                            yield ending
                            return
                    case type if turn_id is not None and received.get("turn_id") == turn_id:
                        yield received
                        if type in TERMINAL_TYPES:
                            return

    async def follow(self, conversation_id: str, after: int | None = None) -> AsyncGenerator[Frame, None]:
        """Yield the frames of a conversation without end, from the cursor or a snapshot. Raises Refused or GivenUp."""

        def opening(cursors: Mapping[str, int]) -> Frame:
            cursor = cursors.get(conversation_id, after)
            frame: Frame = {"type": "conversation.follow", "conversation_id": conversation_id}
            return frame if cursor is None else frame | {"after": cursor}

        async with aclosing(self._frames(opening)) as frames:
            async for received in frames:
                if received.get("conversation_id") == conversation_id:
                    yield received

    async def cancel(self, conversation_id: str) -> None:
        """Ask the server to stop the turn that runs in the conversation, if there is one."""
        if self._connection is not None:
            await self._connection.send(json.dumps({"type": "turn.cancel", "conversation_id": conversation_id}))

    async def _frames(self, opening: Callable[[Mapping[str, int]], Frame]) -> AsyncGenerator[Frame, None]:
        """Yield every frame of the journal once, in order. `opening` makes the first request of each connection."""
        cursors: dict[str, int] = {}
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + self._patience_seconds
        pause = BACKOFF_SECONDS[0]
        while True:
            try:
                connection = await self._connected()
                await connection.send(json.dumps(opening(cursors)))
                while True:
                    frame = await self._next()
                    if frame["type"] == "error":
                        if not frame["retryable"]:
                            raise Refused(frame["code"], frame["message"])
                        self._on_status(f"{frame['message']} ({frame['code']})")
                        if frame["code"] == "conversation_busy":
                            raise Refused(frame["code"], frame["message"])
                        wait_seconds = frame.get("retry_after_ms", 0) / 1000  # with `rate_limited`
                        if loop.time() + wait_seconds > give_up_at:
                            raise Refused(frame["code"], frame["message"])
                        pause = max(pause, wait_seconds)
                        break
                    seq, conversation_id = frame.get("seq"), frame.get("conversation_id")
                    if seq is not None and conversation_id is not None:
                        is_snapshot = frame["type"] == "conversation.snapshot"
                        if seq <= cursors.get(conversation_id, 0) and not is_snapshot:
                            continue
                        cursors[conversation_id] = seq
                    pause, give_up_at = BACKOFF_SECONDS[0], loop.time() + self._patience_seconds
                    yield frame
            except (OSError, TimeoutError, websockets.WebSocketException) as error:
                self._raise_if_final(error)
                self._on_status(f"the connection is lost{_words(error)}")
            self.abort()
            if loop.time() > give_up_at:
                raise GivenUp(f"No node could be reached for {self._patience_seconds:g} seconds.")
            await asyncio.sleep(pause)
            pause = min(pause * 2, BACKOFF_SECONDS[1])

    def abort(self) -> None:
        """Leave the node without a closing handshake, which a frozen one would not answer."""
        if self._connection is not None and self._reader is not None:
            self._connection.transport.abort()
            self._connection = None
            self._reader.cancel()

    async def _connected(self) -> ClientConnection:
        if self._connection is not None and self._reader is not None and not self._reader.done():
            return self._connection
        url = self._urls[0]
        self._urls.append(self._urls.pop(0))  # the next attempt goes to the next node
        connection = await connect(
            url,
            subprotocols=[websockets.Subprotocol(SUBPROTOCOL)],
            additional_headers={"Authorization": f"Bearer {self._token}"},
            compression=None,
            max_size=None,
            open_timeout=5,
            close_timeout=1,
            ping_interval=None,  # heartbeats tell a frozen node from a silent one
            proxy=None,
        )
        try:
            async with asyncio.timeout(10):
                ready = json.loads(await connection.recv())
        except BaseException:
            connection.transport.abort()
            raise
        self._connection = connection
        self._heartbeat_seconds = ready["heartbeat_seconds"]
        self.node_id = ready["node_id"]
        self._inbox = asyncio.Queue(INBOX_FRAMES)
        self._reader = asyncio.create_task(self._read(connection, self._inbox))
        self._on_status(f"connected to {url.removesuffix('/ws')}")
        return connection

    async def _next(self) -> Frame:
        received = await self._inbox.get()
        if isinstance(received, Exception):
            raise received
        return received

    async def _read(self, connection: ClientConnection, inbox: asyncio.Queue[Frame | Exception]) -> None:
        """Read also while no frames are asked for, so that pings are answered and a silent node is noticed."""
        try:
            while True:
                async with asyncio.timeout(2 * self._heartbeat_seconds):
                    frame: Frame = json.loads(await connection.recv())
                if frame["type"] == "goaway":
                    raise ConnectionResetError("the node is going away")
                if frame["type"] not in ("heartbeat", "ready", "pong", "auth.expiring"):
                    await inbox.put(frame)
        except (OSError, TimeoutError, websockets.WebSocketException) as error:
            await inbox.put(error)

    def _raise_if_final(self, error: Exception) -> None:
        close = error.rcvd if isinstance(error, websockets.ConnectionClosed) else None
        if close is not None and close.code in (CloseCode.UNAUTHORIZED, CloseCode.FORBIDDEN):
            raise Refused("unauthorized", close.reason) from error
        if isinstance(error, websockets.InvalidURI):
            raise Refused("invalid_url", str(error)) from error


def _turn_of(snapshot: Frame, content: str) -> str | None:
    """Return the turn of a message whose events are gone: that of the newest message with this content."""
    for message in reversed(snapshot["messages"]):
        if message["role"] == "user" and message["content"] == content:
            turn_id: str | None = message["turn_id"]
            return turn_id
    return None


def _ending_in(snapshot: Frame, turn_id: str) -> Frame | None:
    """Return the end of a turn whose events are gone, made from a snapshot that has its answer."""
    running = snapshot["turn"]
    if running is not None and running["turn_id"] == turn_id:
        return None
    for message in reversed(snapshot["messages"]):
        if message["turn_id"] == turn_id and message["role"] == "assistant":
            status = "completed" if message["status"] == "superseded" else message["status"]
            return {
                "type": f"turn.{status}",
                "conversation_id": snapshot["conversation_id"],
                "seq": snapshot["seq"],
                "turn_id": turn_id,
                "message": message,
            }
    return None


def _words(error: Exception) -> str:
    """Return why the connection is lost, in parentheses, or nothing where it just broke."""
    if isinstance(error, websockets.ConnectionClosed) and error.rcvd is None:
        return ""
    return f" ({str(error) or type(error).__name__})"
