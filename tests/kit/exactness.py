"""What clients have seen of one conversation, on whatever nodes, and that it is exactly what the database has."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any, Final

import asyncpg
from websockets.exceptions import WebSocketException

from anynode.models.rules import NEXT_ROLES
from tests.kit.harness import TERMINAL, Frame, NodeProcess, Socket, socket_to, text_of

PATIENCE_SECONDS: Final = 60.0
HEAD: Final = frozenset({"type", "conversation_id", "seq", "turn_id"})


def roles_after(role: str | None) -> frozenset[str]:
    """The roles that may come after this one (None: first), where it is not told which calls wait for results."""
    return frozenset[str]().union(*(roles for (before, _), roles in NEXT_ROLES.items() if before == role))


class Client:
    """A client of one new conversation with one turn. Clients of the same user and `message_id` follow the same one."""

    def __init__(self, user: str, content: str, message_id: str | None = None) -> None:
        self.user = user
        self.content = content
        self.message_id = message_id or str(uuid.uuid4())
        self.frames: list[Frame] = []  # of the journal
        self.errors: list[Frame] = []
        self.cursors: list[int] = []  # how far it had come on each node that has gone

    @property
    def conversation_id(self) -> str | None:
        """The conversation of the first frame; None before it."""
        return str(self.frames[0]["conversation_id"]) if self.frames else None

    @property
    def cursor(self) -> int:
        """The last seq that it has seen; 0: none."""
        return int(self.frames[-1]["seq"]) if self.frames else 0

    @property
    def text(self) -> str:
        """What it shows of the turn."""
        return text_of(self.frames)

    def another(self) -> Client:
        """Another one that follows the same conversation."""
        return Client(self.user, self.content, self.message_id)

    async def watch(self, *nodes: NodeProcess) -> None:
        """Take the turn to its end. When a node goes away, go on at the next one: from the cursor, or with the same
        message again when nothing has been seen."""
        for node in nodes:
            try:
                async with socket_to(node, self.user) as socket:
                    await self._go_on(socket)
                    await self._watch(socket)
            except (ConnectionError, EOFError, WebSocketException):
                pass
            if self.frames and self.frames[-1]["type"] in TERMINAL:
                return
            self.cursors.append(self.cursor)
        raise AssertionError(f"the client has nowhere to go; it has seen {self.frames}")

    async def _go_on(self, socket: Socket) -> None:
        if self.conversation_id is None:
            await socket.ask(self.content, message_id=self.message_id)
        else:
            await socket.follow(self.conversation_id, self.cursor)

    async def _watch(self, socket: Socket) -> None:
        while not self.frames or self.frames[-1]["type"] not in TERMINAL:
            frame = await socket.receive(within_seconds=PATIENCE_SECONDS)
            if frame["type"] == "error":
                assert frame["retryable"] is True, frame
                self.errors.append(frame)
                if not self.frames:  # the message was refused; a follow goes on by itself
                    await self._go_on(socket)
            elif frame["type"] != "goaway":
                self.frames.append(frame)


async def assert_exact(database_url: str, clients: Sequence[Client], *, epoch: int, text: str) -> None:
    """The clients of one conversation have seen all of its journal, in order and once; the journal is gapless and holds
    one end; the turn was completed under this epoch, with this text, in the database and for every client."""
    conversation_id = clients[0].conversation_id
    assert conversation_id is not None
    connection = await asyncpg.connect(database_url)
    try:
        events, messages, turns = [
            await connection.fetch(statement, uuid.UUID(conversation_id))
            for statement in (
                "SELECT seq, type, epoch, turn_id::text AS turn_id, payload::text AS payload, c.last_seq "
                "FROM events e JOIN conversations c ON c.id = conversation_id WHERE c.id = $1 ORDER BY seq",
                "SELECT position, role, content, status FROM messages WHERE conversation_id = $1 ORDER BY position",
                "SELECT status, epoch, id::text AS id FROM turns WHERE conversation_id = $1",
            )
        ]
    finally:
        await connection.close()
    assert_journal(events, epoch)
    assert [(turn["status"], turn["epoch"], turn["id"]) for turn in turns] == [
        ("completed", epoch, events[-1]["turn_id"])
    ]
    assert [(message["position"], message["role"], message["status"]) for message in messages] == [
        (1, "user", "completed"),
        (2, "assistant", "completed"),
    ]
    assert messages[1]["content"] == text
    for client in clients:
        assert client.conversation_id == conversation_id
        assert_shown(events, client.frames)
        assert client.text == client.frames[-1]["message"]["content"] == text


def assert_journal(events: Sequence[asyncpg.Record], epoch: int) -> None:
    """The journal of one turn is gapless and in the order of its epochs; each takeover, and the end, is there once."""
    assert [event["seq"] for event in events] == list(range(1, events[-1]["last_seq"] + 1))
    types = [event["type"] for event in events]
    assert types[:2] == ["message.created", "turn.started"]
    assert types[-1] == "turn.completed", [(e["seq"], e["type"], e["epoch"], e["payload"][:80]) for e in events]
    assert [type for type in types if type in TERMINAL] == ["turn.completed"]
    assert len({event["turn_id"] for event in events}) == 1
    expected = 1
    for event in events:
        expected += event["type"] == "turn.restarted"
        assert event["epoch"] == expected
    assert expected == epoch


def assert_shown(events: Sequence[asyncpg.Record], frames: Sequence[Frame]) -> None:
    """The frames are a gapless journal's events, each of them once and in order; deltas may be merged, under the seq
    of the last one."""
    cursor = 0
    for frame in frames:
        shown = events[cursor : frame["seq"]]
        assert shown, f"seq {frame['seq']} comes after {cursor}"
        cursor = frame["seq"]
        assert {event["type"] for event in shown} == {frame["type"]}
        assert {event["turn_id"] for event in shown} == {frame.get("turn_id", shown[0]["turn_id"])}
        payloads: list[dict[str, Any]] = [json.loads(event["payload"]) for event in shown]
        fields = {name: value for name, value in frame.items() if name not in HEAD}
        if frame["type"] == "turn.delta":
            assert fields == {"text": "".join(payload["text"] for payload in payloads)}
        else:
            assert [fields] == payloads
    assert cursor == len(events)
