"""An agent that works in steps, begins behind those that were completed before it, and never says a thing twice."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any, Final

from anynode import AgentEvent, HistoryMessage, StepEnd, TextDelta, Turn
from tests.agents.scripted import _directory as directory
from tests.agents.scripted import script, script_of

AGENT: Final = "tests.agents.stepping:improvise"
WORD_SECONDS: Final = 0.04


async def improvise(turn: Turn) -> AsyncIterator[AgentEvent]:
    """Follow the question: a list of steps, each a list of actions. There are three actions more than in a script:
    `words` says a number of new words; `chatter` says new words one after another up to a gate; `see` tells what the
    agent was given."""
    steps = json.loads(turn.history[-1].content)
    completed = sum(message.role == "assistant" for message in turn.steps)
    for actions in steps[completed:]:
        for action, *arguments in actions:
            match action:
                case "words":
                    for _ in range(arguments[0]):
                        yield TextDelta(_word())
                case "chatter":
                    while not (directory() / arguments[0]).exists():
                        yield TextDelta(_word())
                        await asyncio.sleep(WORD_SECONDS)
                case "see":
                    yield TextDelta(json.dumps(given(turn)))
                case _:
                    asked = HistoryMessage("user", script_of((action, *arguments)))
                    async for event in script(replace(turn, history=[asked])):
                        yield event
        yield StepEnd()


def given(turn: Turn) -> dict[str, Any]:
    """What the agent was given, as JSON can say it."""
    return {
        "attempt": turn.attempt,
        "history": [[message.role, message.content] for message in turn.history],
        "steps": [
            [message.role, message.content, message.tool_calls, message.tool_name, message.tool_call_id]
            for message in turn.steps
        ],
        "partial": turn.partial,
    }


def question(*steps: Sequence[Any]) -> str:
    """The question that makes the agent do these steps; each is a list of actions."""
    return json.dumps(steps)


def _word() -> str:
    return secrets.token_hex(4) + " "
