"""Clients that note when each frame comes: one that survives faults, and a raw one for exact times."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from typing import Final, NamedTuple
from uuid import UUID

from anynode.server.client.client import Client, GivenUp, Refused
from bench.load import Connection, LoadError, connect
from bench.seen import ENDINGS, Frame, Seen

PATIENCE_SECONDS: Final = 30.0


class Witness:
    """A client of one turn, like the one of `server/client`: it reconnects at once and follows from its last seq.

    It asks, or only watches. `began` is set at its first text.
    """

    def __init__(self, ports: Sequence[int], token: str, conversation_id: UUID, *, is_asking: bool) -> None:
        self.port = ports[0]  # the first is where it begins; it goes on to the others
        self.conversation_id = conversation_id
        self.is_asking = is_asking
        self.seen = Seen()
        self.began = asyncio.Event()
        self._urls = [f"ws://127.0.0.1:{port}" for port in ports]
        self._token = token

    async def run(self) -> None:
        """Stay until the turn has ended. Raises LoadError."""
        conversation_id = str(self.conversation_id)
        try:
            async with Client(self._urls, self._token, patience_seconds=PATIENCE_SECONDS) as client:
                frames = (
                    client.send("What is new?", conversation_id=conversation_id)
                    if self.is_asking
                    else client.follow(conversation_id, 0)
                )
                async with aclosing(frames):
                    async for frame in frames:
                        self.seen.hear(frame, time.monotonic())
                        if self.seen.came:
                            self.began.set()
                        if self.seen.ending is not None:
                            return
        except (Refused, GivenUp) as error:
            raise LoadError(f"conversation {conversation_id}: {error}") from error
        raise LoadError(f"conversation {conversation_id}: its turn has no end")


class Heard(NamedTuple):
    """A frame, and the time at which it came."""

    at: float
    frame: Frame


def is_type(type: str) -> Callable[[Frame], bool]:
    """Whether a frame is of this type."""
    return lambda frame: bool(frame["type"] == type)


def is_from(seq: int) -> Callable[[Frame], bool]:
    """Whether a frame is, or holds, this event or a later one."""
    return lambda frame: bool(frame["seq"] >= seq)


def is_ending(frame: Frame) -> bool:
    """Whether a frame is a turn's last one."""
    return frame["type"] in ENDINGS


class Ear:
    """One raw connection that asks and follows in any number of conversations and keeps all frames."""

    def __init__(self) -> None:
        self.heard: dict[UUID, list[Heard]] = {}
        self._news: dict[UUID, asyncio.Event] = {}
        self._error: LoadError | None = None
        self._connection: Connection | None = None

    async def open(self, port: int, token: str) -> None:
        """Connect."""
        self._connection = await connect(port, token, self._hear, self._fail)

    def ask(self, conversation_id: UUID, content: str) -> None:
        """Send a message."""
        self._send("message.send", conversation_id, message_id=str(uuid.uuid4()), content=content)

    def follow(self, conversation_id: UUID, after: int) -> None:
        """Follow from a cursor."""
        self._send("conversation.follow", conversation_id, after=after)

    def cancel(self, conversation_id: UUID) -> None:
        """Cancel the turn that runs."""
        self._send("turn.cancel", conversation_id)

    async def first(self, conversation_id: UUID, is_it: Callable[[Frame], bool], within_seconds: float) -> Heard:
        """Return the first frame that fits; it may have come already. Raises LoadError or TimeoutError."""
        news = self._news.setdefault(conversation_id, asyncio.Event())
        looked_at = 0
        async with asyncio.timeout(within_seconds):
            while True:
                if self._error is not None:
                    raise self._error
                heard = self.heard.get(conversation_id, [])
                for one in heard[looked_at:]:
                    if is_it(one.frame):
                        return one
                looked_at = len(heard)
                news.clear()
                await news.wait()

    def frames(self, conversation_id: UUID) -> Iterator[Frame]:
        """Return all frames of a conversation that have come."""
        return (heard.frame for heard in self.heard.get(conversation_id, ()))

    def last_seq(self, conversation_id: UUID) -> int:
        """Return the cursor of a conversation."""
        seq: int = self.heard[conversation_id][-1].frame["seq"]
        return seq

    def close(self) -> None:
        """Drop the connection."""
        if self._connection is not None:
            self._connection.abort()

    def _send(self, type: str, conversation_id: UUID, **fields: object) -> None:
        assert self._connection is not None
        frame = {"type": type, "conversation_id": str(conversation_id), **fields}
        self._connection.send(json.dumps(frame).encode())

    def _hear(self, text: bytes) -> None:
        at = time.monotonic()
        frame = json.loads(text)
        if frame["type"] == "error":
            self._fail(LoadError(text.decode()))
        elif "seq" in frame:
            conversation_id = UUID(frame["conversation_id"])
            self.heard.setdefault(conversation_id, []).append(Heard(at, frame))
            if conversation_id in self._news:
                self._news[conversation_id].set()

    def _fail(self, error: LoadError) -> None:
        self._error = self._error or error
        for news in self._news.values():
            news.set()
