"""Agents made of what people have already: a function, and a Pydantic AI agent whose model is a function."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, Final

import pydantic_ai
from pydantic_ai import RunContext
from pydantic_ai.messages import ModelMessage
from pydantic_ai.models.function import AgentInfo, DeltaToolCall, FunctionModel

from anynode import Turn, from_pydantic_ai, from_run_agent
from tests.agents.scripted import DIRECTORY, POLL_SECONDS

RUN_AGENT: Final = "tests.agents.adapted:function"
PYDANTIC_AI: Final = "tests.agents.adapted:model"


async def run_agent(messages: list[dict[str, Any]]) -> tuple[str, list[Any]]:
    """Looks up each word of the question, and answers with what it was given."""
    calls = [
        {"id": word, "function": {"name": "look_up", "arguments": {"word": word}}, "result": f"found {word}"}
        for word in messages[-1]["content"].split()
    ]
    return json.dumps([[message["role"], message["content"]] for message in messages]), calls


async def stream(messages: list[ModelMessage], info: AgentInfo) -> AsyncGenerator[Any, None]:
    """Looks up each word of the question, all at once, then answers with what it was given."""
    last = messages[-1].parts[-1]
    if last.part_kind == "user-prompt":
        yield {
            number: DeltaToolCall("look_up", json.dumps({"word": word}), tool_call_id=word)
            for number, word in enumerate(str(last.content).split())
        }
        return
    yield json.dumps([[part.part_kind, getattr(part, "content", "")] for message in messages for part in message.parts])


async def look_up(context: RunContext[Turn], word: str) -> str:
    """Marks that it is run; a word `slow…` takes as long as there is no gate of its name."""
    directory = Path(os.environ[DIRECTORY])
    with (directory / f"{word}-run").open("a") as file:
        file.write(f"{context.deps.attempt}\n")
    while word.startswith("slow") and not (directory / word).exists():  # noqa: ASYNC110 (it reaches into a process)
        await asyncio.sleep(POLL_SECONDS)
    return f"found {word}"


function = from_run_agent(run_agent)
model = from_pydantic_ai(
    pydantic_ai.Agent(FunctionModel(stream_function=stream), deps_type=Turn, tools=[look_up]), deps=lambda turn: turn
)
