"""An agent that does what a script says, step by step: the steps that are completed are not done again."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Final

from anynode import AgentEvent, HistoryMessage, Turn
from tests.agents.recalling import recall

AGENT: Final = "tests.agents.stock:answer"


async def answer(turn: Turn) -> AsyncIterator[AgentEvent]:
    """Steps end with `step`; of an attempt's first step nothing stands."""
    actions = json.loads(turn.history[-1].content)
    for _ in (message for message in turn.steps if message.role == "assistant"):
        actions = actions[actions.index(["step"]) + 1 :]
    question = HistoryMessage("user", json.dumps(actions))
    async for event in recall(replace(turn, history=[*turn.history[:-1], question])):
        yield event
