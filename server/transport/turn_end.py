"""The end of a turn, for clients that ask once and wait: it is followed like any other turn, then read as stored."""

from __future__ import annotations

import asyncio
from typing import Any

from anynode.models.rules import FAILED
from anynode.models.turns import TurnRef
from anynode.server.engine.node import Node
from anynode.server.engine.turn_reader import TurnInterrupted
from anynode.server.errors import AgentFailed, Draining
from anynode.server.protocol.bodies import Answer
from anynode.server.transport.cut_short import LAST_WORDS_SECONDS, CutShort, run_unless


async def wait_end(node: Node, turn: TurnRef) -> None:
    """Wait for the end of a turn, also while Postgres is away. Raises Draining where this node goes down first, and
    NotFound where the conversation is deleted."""
    try:
        # The end of this very turn may be what the drain waits for: then both come at once.
        await run_unless(node.turns.wait_end(turn), node.drained.wait(), grace_seconds=LAST_WORDS_SECONDS)
    except CutShort:
        raise Draining("This node is shutting down; the turn goes on.") from None


async def answer_of(node: Node, turn: TurnRef) -> Answer:
    """Return what a turn has answered, once it has ended.

    Raises AgentFailed where it has failed, TurnInterrupted where it runs again, what `wait_end` raises, and
    DatabaseUnavailable.
    """
    await wait_end(node, turn)
    stored = await node.turns.stored(turn)
    if stored.status == FAILED:
        raise AgentFailed(stored.error.message if stored.error else None)
    if not stored.messages:
        raise TurnInterrupted
    message = stored.messages[-1]
    calls: list[Any] = [call for each in stored.messages for call in each.tool_calls or ()]
    return Answer(turn.conversation_id, message.content, calls, turn.turn_id, message, stored.usage)


async def wait_stopped(node: Node, turn: TurnRef, *, within_seconds: float | None = None) -> None:
    """Wait until a turn that was asked to stop has ended, at most for `within_seconds` (None: as long as it takes). A
    turn that is not over by then, or when this node goes down, is stopped by another node. Raises NotFound."""
    try:
        async with asyncio.timeout(within_seconds):
            await wait_end(node, turn)
    except (TimeoutError, Draining):
        pass
