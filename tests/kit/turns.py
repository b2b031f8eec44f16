"""A turn for tests that have no database: its events, what is stored of it, and a reader that shows it by a script."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, TypeAlias, cast
from uuid import UUID

import msgspec
from starlette.datastructures import Headers

from anynode.models.events import Event
from anynode.models.turns import TurnRef
from anynode.server.auth import Identity
from anynode.server.engine.node import Node
from anynode.server.protocol.bodies import NoQuery, StoredTurn
from anynode.server.protocol.frames import CallOfTool, ErrorDetail, Message, Usage
from anynode.server.transport.http import ApiRequest
from tests.kit.asgi import Peer

USER = "user-1"
CONVERSATION = UUID("0199aa10-5f3e-7c51-9b1d-2f5b6f0a7c12")
TURN = UUID("0199aa10-5f3e-7c51-9b1d-2f5b6f0a7c11")
OTHER_TURN = UUID("0199aa10-5f3e-7c51-9b1d-2f5b6f0a7c13")
AT = datetime(2026, 1, 2, 3, 4, 5, 600000, UTC)
USAGE = Usage(3, 4, "scripted", 0.5)
ERROR = ErrorDetail("agent_failed", "The agent failed.", False)
FIRST_SEQ = 7

Entry: TypeAlias = tuple[str, dict[str, Any]]  # the type of an event, and its payload

STARTED: Entry = ("turn.started", {"message_id": "m-1"})


def turn_ref(first_seq: int | None = FIRST_SEQ, turn_id: UUID = TURN) -> TurnRef:
    """Return where the turn is."""
    return TurnRef(USER, CONVERSATION, turn_id, first_seq)


def said(text: str) -> Entry:
    """Return an event with more text."""
    return "turn.delta", {"text": text}


def called(id: str, **arguments: Any) -> Entry:
    """Return an event in which the model calls a tool."""
    return "turn.tool_call", {"tool_call_id": id, "tool_name": "search", "arguments": arguments}


def result(id: str, content: str = "found", *, is_error: bool = False) -> Entry:
    """Return an event in which a tool answers."""
    return "turn.tool_result", {"tool_call_id": id, "tool_name": "search", "content": content, "is_error": is_error}


def restarted(text: str, epoch: int = 2) -> Entry:
    """Return the event of a takeover after which `text` stands."""
    return "turn.restarted", {"epoch": epoch, "text": text}


def ended(status: str = "completed") -> Entry:
    """Return the event that ends a turn."""
    fields: dict[str, Any] = {"message": msgspec.to_builtins(message(status=status))}
    if status == "completed":
        fields["usage"] = msgspec.to_builtins(USAGE)
    if status == "failed":
        fields["error"] = msgspec.to_builtins(ERROR)
    return f"turn.{status}", fields


def journal(*entries: Entry, first_seq: int = FIRST_SEQ, turn_id: UUID | None = TURN) -> list[Event]:
    """Return the events of a turn in the journal."""
    id = None if turn_id is None else str(turn_id)
    return [Event(seq, type, id, json.dumps(payload)) for seq, (type, payload) in enumerate(entries, first_seq)]


def message(
    content: str = "",
    role: str = "assistant",
    status: str = "completed",
    calls: Sequence[CallOfTool] | None = None,
    tool_call_id: str | None = None,
) -> Message:
    """Return a message that answers in the turn."""
    tool_name = None if tool_call_id is None else "search"
    return Message(TURN, role, content, calls, tool_name, tool_call_id, status, TURN, AT)


def stored_turn(status: str = "completed", *messages: Message) -> StoredTurn:
    """Return the turn as it is stored."""
    return StoredTurn(
        conversation_id=CONVERSATION,
        turn_id=TURN,
        status=status,
        usage=None if status == "running" else USAGE,
        error=ERROR if status == "failed" else None,
        created_at=AT,
        finished_at=None if status == "running" else AT,
        messages=messages,
    )


class ScriptedReader:
    """Reads one turn as a script says: batches of events, then an error where one is given, else for ever if it
    `stays`."""

    def __init__(self, *script: Sequence[Event] | Exception, stays: bool = False) -> None:
        self.script: Sequence[Sequence[Event] | Exception] = script
        self.stays = stays
        self.asked: list[tuple[TurnRef, bool, bool]] = []  # each with `is_whole` and `catches_up`
        self.is_closed = False
        self.ended = asyncio.Event()
        self.stored_as: StoredTurn | Exception = stored_turn("completed", message("hello"))
        self.wait_error: Exception | None = None

    async def events(
        self, turn: TurnRef, *, is_whole: bool, catches_up: bool = False
    ) -> AsyncGenerator[Sequence[Event], None]:
        """Yield the batches of the script."""
        self.asked.append((turn, is_whole, catches_up))
        try:
            for step in self.script:
                if isinstance(step, Exception):
                    raise step
                yield step
            if self.stays:
                await asyncio.Event().wait()
        finally:
            self.is_closed = True

    async def wait_end(self, turn: TurnRef) -> None:
        """Wait until the test says that the turn has ended, or raise what it says."""
        if self.wait_error is not None:
            raise self.wait_error
        await self.ended.wait()

    async def stored(self, turn: TurnRef) -> StoredTurn:
        """Return what the test says is stored."""
        if isinstance(self.stored_as, Exception):
            raise self.stored_as
        return self.stored_as


def node_with(**parts: Any) -> Node:
    """Return a node of these parts, which neither drains nor runs anything."""
    return cast(Node, SimpleNamespace(draining=asyncio.Event(), drained=asyncio.Event(), node_id="test-1", **parts))


def request_of(peer: Peer, *, expires_at: float = 4e9) -> ApiRequest[Any, Any]:
    """Return the request of a peer that asks for nothing else."""
    return ApiRequest(Identity(USER, expires_at), {}, {}, NoQuery(), None, Headers(), peer.receive)
