"""Agents that tests name in `AGENT`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

from anynode import AgentEvent, TextDelta, Turn


async def transcript(turn: Turn) -> AsyncIterator[AgentEvent]:
    """Answers with the history that it was given, as JSON: a list of [role, content]."""
    yield TextDelta(json.dumps([[message.role, message.content] for message in turn.history]))


async def silent(turn: Turn) -> AsyncIterator[AgentEvent]:
    """Fails without a word when the question asks for it, and is `transcript` otherwise."""
    if turn.history[-1].content.startswith("fail"):
        raise RuntimeError("as the question asks")
    async for event in transcript(turn):
        yield event


async def waiting(turn: Turn) -> AsyncIterator[AgentEvent]:
    """Never says anything."""
    await asyncio.Event().wait()
    yield TextDelta("never")
