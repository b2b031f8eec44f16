"""Tools that mark with what they are called and wait for gates, and agents that tell which calls they are given."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from anynode import AgentEvent, TextDelta, ToolCall, ToolContext, ToolResult, Turn, resumes_calls
from tests.agents.scripted import DIRECTORY, POLL_SECONDS

TOOLS: Final = "tests.agents.waiting_tools:tools"
LET_GO: Final = "let-go"


async def look_up(word: str, context: ToolContext) -> str:
    """Look a word up. One that begins with `slow` takes as long as there is no gate of its name."""
    _mark(word, f"{context.tool_call_id} {context.attempt} {context.user_id}")
    try:
        while word.startswith("slow") and not (_directory() / word).exists():  # noqa: ASYNC110 (it is another process's)
            await asyncio.sleep(POLL_SECONDS)
    except asyncio.CancelledError:
        _mark(LET_GO, word)
        raise
    return f"found {word}"


def block(word: str, context: ToolContext) -> str:
    """Look a word up as `look_up` does, but in a thread."""
    _mark(word, f"{context.tool_call_id} {context.attempt} {context.user_id}")
    while word.startswith("slow") and not (_directory() / word).exists():
        time.sleep(POLL_SECONDS)
    return f"found {word}"


async def rest(seconds: float) -> str:
    """Do nothing."""
    await asyncio.sleep(seconds)
    return "rested"


tools = [look_up, block, rest]


async def forgetful(turn: Turn) -> AsyncIterator[AgentEvent]:
    """Gets stuck between two results; after a takeover it tells the ids of the pending calls."""
    if turn.attempt == 1:
        yield ToolCall("1", "tool", {})
        yield ToolCall("2", "tool", {})
        yield ToolResult("1", "tool", "found")
        await asyncio.Event().wait()
    yield TextDelta(json.dumps([call.tool_call_id for call in turn.pending]))


@resumes_calls
async def attentive(turn: Turn) -> AsyncIterator[AgentEvent]:
    """Answer as `forgetful` does, as an agent that resumes calls."""
    async for event in forgetful(turn):
        yield event


def _directory() -> Path:
    return Path(os.environ[DIRECTORY])


def _mark(word: str, line: str) -> None:
    with (_directory() / f"{word}-runs").open("a") as file:
        file.write(f"{line}\n")


def runs_of(directory: Path, word: str) -> list[list[str]]:
    """The id, attempt and user of each call with this word."""
    path = directory / f"{word}-runs"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []
