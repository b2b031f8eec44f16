"""A device: a client's program that comes and goes, keeps what it was shown, and repeats what was not answered."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from websockets.exceptions import WebSocketException

from tests.kit.harness import TERMINAL, Frame, NodeProcess, Socket, socket_to

AHEAD: Final = 1000  # how far a cursor is ahead that is
RECONNECT_SECONDS: Final = 0.02
SILENCE_SECONDS_MAX: Final = 60.0
BROKEN: Final = (OSError, EOFError, WebSocketException)


@dataclass
class Transcript:
    """The frames of a conversation that a device was shown: from `start` on, or from a snapshot, each event once and
    without a gap. `asks` is what its next frame has to answer."""

    start: int = 0
    frames: list[Frame] = field(default_factory=list)
    asks: str = "cursor"  # or "snapshot", "ahead"; both are answered by a snapshot

    @property
    def cursor(self) -> int:
        """The last seq that was shown."""
        return int(self.frames[-1]["seq"]) if self.frames else self.start

    @property
    def after(self) -> int | None:
        """What to follow from."""
        return {"cursor": self.cursor, "snapshot": None, "ahead": self.cursor + AHEAD}[self.asks]

    def add(self, frame: Frame, *, is_expired: bool) -> None:
        """Show one more frame."""
        if frame["type"] == "conversation.snapshot":
            assert self.asks != "cursor" or is_expired, f"a snapshot instead of what follows {self.cursor}: {frame}"
            self.frames.clear()
        else:
            assert self.asks == "cursor", f"no snapshot: {frame}"
            assert frame["seq"] > self.cursor, f"shown again after {self.cursor}: {frame}"
        self.frames.append(frame)
        self.asks = "cursor"

    def texts(self) -> dict[str, str]:
        """The text that is shown of each turn; what its end says must be no other."""
        texts: dict[str, str] = {}
        for frame in self.frames:
            match frame["type"]:
                case "conversation.snapshot" if frame["turn"] is not None:
                    texts[frame["turn"]["turn_id"]] = frame["turn"]["text"]
                case "turn.started":
                    texts[frame["turn_id"]] = ""
                case "turn.delta":
                    texts[frame["turn_id"]] += frame["text"]
                case "turn.restarted":
                    texts[frame["turn_id"]] = frame["text"]
                case type if type in TERMINAL:
                    assert frame["message"]["content"] == texts[frame["turn_id"]]
        return texts


@dataclass
class Request:
    """A frame that asks for something, and what has become of it: `unknown`, `lost`, `done`, or an error's code."""

    frame: Frame
    may_be_known: bool = False  # its message may have been admitted already
    outcome: str = "unknown"
    socket: Socket | None = None  # where it was sent last

    @property
    def request_id(self) -> str:
        """The `request_id` of the frame."""
        return str(self.frame["request_id"])

    @property
    def message_id(self) -> str | None:
        """The message's, if it is one: then it may be sent again."""
        return self.frame["message_id"] if self.frame["type"] == "message.send" else None


class Device:
    """One connection at a time, to the node at `slot` of `nodes`, or the next one when that goes away.

    `expired` are the conversations of which a snapshot may come without having been asked for.
    """

    def __init__(self, nodes: Sequence[NodeProcess], slot: int, user: str, expired: Collection[str]) -> None:
        self.user = user
        self.slot = slot
        self.transcripts: dict[str, Transcript] = {}
        self.conversation_of: dict[str, str] = {}  # message_id → conversation, as events have told it
        self.unanswered: dict[str, Request] = {}
        self._nodes = nodes
        self._expired = expired
        self._muted: dict[str, str] = {}  # request_id → conversation whose frames are of no use until the answer
        self._socket: Socket | None = None
        self._talking = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    @property
    def is_online(self) -> bool:
        """Whether it has, or wants, a connection."""
        return self._task is not None

    def raise_failure(self) -> None:
        """Raise what has been wrong with a frame, if anything has."""
        if self._task is not None and self._task.done():
            self._task.result()

    async def go(self, slot: int | None = None) -> None:
        """Leave the node and connect to the one at a slot, going on with every conversation."""
        await self.leave()
        self.slot = self.slot if slot is None else slot
        self._task = asyncio.create_task(self._run())

    async def leave(self) -> None:
        """Vanish without a closing handshake."""
        if self._task is not None:
            task, self._task = self._task, None
            task.cancel()
            await asyncio.wait((task,))
            if not task.cancelled():
                task.result()

    async def ask(self, frame: Frame, *, may_be_known: bool = False) -> Request:
        """Ask for something, on this connection or the next. A message that is not yet answered is one request."""
        if not self.is_online:
            await self.go()
        for pending in self.unanswered.values():
            if pending.message_id is not None and pending.message_id == frame.get("message_id"):
                return pending
        request = Request({**frame, "request_id": str(uuid.uuid4())}, may_be_known)
        self.unanswered[request.request_id] = request
        async with self._talking:
            if self._socket is not None and request.socket is None:
                with suppress(*BROKEN):
                    await self._send(request, self._socket)
        return request

    async def _run(self) -> None:
        while True:
            try:
                async with socket_to(self._nodes[self.slot], self.user) as socket:
                    try:
                        await self._open(socket)
                        while True:
                            await self._take(socket, await socket.receive(within_seconds=SILENCE_SECONDS_MAX))
                    finally:
                        self._socket = None
                        socket.drop()
                        self._lose(socket)
            except BROKEN:
                pass
            self.slot = (self.slot + 1) % len(self._nodes)
            await asyncio.sleep(RECONNECT_SECONDS)

    async def _open(self, socket: Socket) -> None:
        async with self._talking:
            self._muted.clear()
            self._socket = socket
            again = list(self.unanswered.values())
            for request in again:
                await self._send(request, socket, is_opening=True)
            for conversation_id, transcript in list(self.transcripts.items()):
                if conversation_id not in self._muted.values():
                    await socket.follow(conversation_id, transcript.after)

    async def _send(self, request: Request, socket: Socket, *, is_opening: bool = False) -> None:
        # Handled in order: by the pong the request has been done, or an error has said why not.
        ping = {"type": "ping", "request_id": request.request_id}
        request.may_be_known |= request.socket is not None
        request.socket = socket
        conversation_id = self._conversation_of(request)
        if conversation_id is not None and self._shows_more_of(conversation_id, request, is_opening=is_opening):
            # What is asked is followed from its turn's start, which need not be where the transcript ends. So that is
            # not heard.
            self.transcripts.setdefault(conversation_id, Transcript())
            self._muted[request.request_id] = conversation_id
            unfollow = {"type": "conversation.unfollow", "conversation_id": conversation_id}
            for frame in (unfollow, request.frame, unfollow, ping):
                await socket.send(frame)
        else:
            await socket.send(request.frame)
            await socket.send(ping)

    def _conversation_of(self, request: Request) -> str | None:
        """The conversation that it is about, if that is known."""
        return request.frame.get("conversation_id") or self.conversation_of.get(request.message_id or "")

    def _shows_more_of(self, conversation_id: str, request: Request, *, is_opening: bool) -> bool:
        """Whether the conversation is not followed from where the transcript ends, or would no longer be."""
        if conversation_id in self._muted.values():
            return True
        if conversation_id in self.transcripts:
            return is_opening or request.may_be_known
        others = [self._conversation_of(other) for other in self.unanswered.values() if other is not request]
        return request.may_be_known and conversation_id in others

    def _lose(self, socket: Socket) -> None:
        for request in list(self.unanswered.values()):
            if request.socket is socket and request.message_id is None:
                request.outcome = "lost"
                del self.unanswered[request.request_id]

    async def _take(self, socket: Socket, frame: Frame) -> None:
        match frame["type"]:
            case "error":
                assert "request_id" in frame, frame
                self.unanswered[frame["request_id"]].outcome = frame["code"]
            case "pong":
                await self._answered(socket, frame["request_id"])
            case "goaway":
                pass
            case _:
                self._show(frame)

    async def _answered(self, socket: Socket, request_id: str) -> None:
        request = self.unanswered.pop(request_id)
        if request.outcome == "unknown":
            request.outcome = "done"
        elif request.outcome == "draining" and request.message_id is not None:
            request.outcome = "unknown"
            self.unanswered[request_id] = request  # for the next node
        conversation_id = self._muted.pop(request_id, None)
        if conversation_id is not None and conversation_id not in self._muted.values():
            await socket.follow(conversation_id, self.transcripts[conversation_id].after)

    def _show(self, frame: Frame) -> None:
        conversation_id = frame["conversation_id"]
        if frame["type"] == "turn.started":
            self.conversation_of[frame["message_id"]] = conversation_id
        if conversation_id in self._muted.values():
            return
        transcript = self.transcripts.get(conversation_id)
        if transcript is None:  # what this device has asked begins here
            assert frame["type"] in ("message.created", "turn.started", "conversation.snapshot"), frame
            transcript = self.transcripts[conversation_id] = Transcript(frame["seq"] - 1)
        transcript.add(frame, is_expired=conversation_id in self._expired)
