"""An ordinary user, as a process: asks every 100 ms, and comes in anew every 250 ms. Writes a JSON line for each.

A line has `at` (seconds of the machine's monotonic clock when it began), `kind` and `ms`; or `why`, if it was refused.
The kinds are `token` (from sending a message to the answer's first text), `socket` (a new connection up to `ready`),
`post` (a small body over HTTP) and `stream` (the head of a stream of events). Ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import uuid
from collections.abc import Iterator
from itertools import cycle
from typing import Any, Final

import uvloop
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

USER: Final = "bystander"
ASKING_SECONDS: Final = 0.1
COMING_SECONDS: Final = 0.25
PATIENCE_SECONDS: Final = 10.0
WAITING_MAX: Final = 15  # questions without an answer; a user with more waits
QUESTION: Final = "hi"


class Bystander:
    """One user with one socket, and a new connection now and then."""

    def __init__(self, port: int, token: str) -> None:
        self._port = port
        self._token = token
        self._asked: dict[str, float] = {}  # by message_id
        self._conversations: dict[str, str] = {}  # the message_id by the conversation, while it has no text yet
        self._newest = ""
        self._ended = asyncio.Event()

    async def run(self) -> None:
        """Ask until the standard input ends."""
        asyncio.get_running_loop().add_reader(sys.stdin.fileno(), self._ended.set)
        tasks = [asyncio.create_task(self._chat()), asyncio.create_task(self._come())]
        ending = asyncio.create_task(self._ended.wait())
        await asyncio.wait([*tasks, ending], return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
            task.cancel()
        for began in self._asked.values():  # what still waits has waited for at least this long
            _say("token", began, ms=_since(began))

    async def _chat(self) -> None:
        while True:
            began = time.monotonic()
            try:
                async with self._connected() as socket, asyncio.TaskGroup() as group:
                    group.create_task(self._ask(socket))
                    group.create_task(self._hear(socket))
            except* (OSError, WebSocketException) as errors:
                _say("chat", began, why=repr(errors.exceptions[0])[:200])
            for began in self._asked.values():
                _say("token", began, ms=_since(began))
            self._asked.clear()
            self._conversations.clear()
            await asyncio.sleep(ASKING_SECONDS)

    def _connected(self) -> Any:
        return connect(
            f"ws://127.0.0.1:{self._port}/ws",
            subprotocols=["anynode.v1"],  # type: ignore[list-item]
            additional_headers={"Authorization": f"Bearer {self._token}"},
            compression=None,
            max_size=None,
            proxy=None,
            open_timeout=PATIENCE_SECONDS,
            close_timeout=1,
        )

    async def _ask(self, socket: ClientConnection) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            if len(self._asked) < WAITING_MAX:
                message_id = uuid.uuid4().hex
                self._asked[message_id] = time.monotonic()
                frame = {"type": "message.send", "message_id": message_id, "content": QUESTION}
                await socket.send(json.dumps({**frame, "request_id": message_id}))
            due += ASKING_SECONDS
            await asyncio.sleep(max(due - loop.time(), 0))
            due = max(due, loop.time() - 1)

    async def _hear(self, socket: ClientConnection) -> None:
        async for text in socket:
            frame = json.loads(text)
            match frame["type"]:
                case "turn.started":
                    self._conversations[frame["conversation_id"]] = frame["message_id"]
                case "turn.delta":
                    message_id = self._conversations.pop(frame["conversation_id"], "")
                    began = self._asked.pop(message_id, None)
                    if began is not None:
                        _say("token", began, ms=_since(began))
                case "turn.completed" | "turn.failed" | "turn.cancelled":
                    self._newest = frame["conversation_id"]
                    message_id = self._conversations.pop(frame["conversation_id"], "")
                    began = self._asked.pop(message_id, None)
                    if began is not None:
                        _say("token", began, why=frame["type"])
                    unfollow = {"type": "conversation.unfollow", "conversation_id": frame["conversation_id"]}
                    await socket.send(json.dumps(unfollow))
                case "error":
                    began = self._asked.pop(frame.get("request_id", ""), None)
                    if began is not None:
                        _say("token", began, why=" ".join(filter(None, (frame["code"], frame.get("limit")))))
        raise ConnectionError("the node closed the socket")

    async def _come(self) -> None:
        kinds: Iterator[str] = cycle(("socket", "post", "stream"))
        for kind in kinds:
            began = time.monotonic()
            try:
                async with asyncio.timeout(PATIENCE_SECONDS):
                    if kind == "socket":
                        async with self._connected() as socket:
                            ready = json.loads(await socket.recv())
                        if ready["type"] != "ready":
                            raise ConnectionError(ready.get("code"))
                    elif kind == "post":
                        await self._request("POST", "/conversations", '{"title": "what an ordinary user has to say"}')
                    elif self._newest:
                        await self._request("GET", f"/conversations/{self._newest}/events")
            except (OSError, WebSocketException) as error:
                _say(kind, began, why=repr(error)[:200])
            else:
                _say(kind, began, ms=_since(began))
            await asyncio.sleep(COMING_SECONDS)

    async def _request(self, method: str, path: str, body: str | None = None) -> None:
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {self._token}\r\n"
        if body is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            writer.write(f"{head}\r\n{body or ''}".encode())
            status = (await reader.readline()).decode("latin-1").strip()
            if status[9:10] != "2":
                raise ConnectionError(status)
        finally:
            writer.transport.abort()


def _since(began: float) -> float:
    return (time.monotonic() - began) * 1000


def _say(kind: str, began: float, **more: object) -> None:
    print(json.dumps({"kind": kind, "at": began, **more}), flush=True)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(Bystander(int(sys.argv[1]), sys.argv[2]).run())
