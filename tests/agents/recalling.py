"""An agent that does what a script says, and in between tells what history it was given."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final

from anynode import AgentEvent, HistoryMessage, TextDelta, ToolCall, Turn
from tests.agents.scripted import script, script_of

AGENT: Final = "tests.agents.recalling:recall"


async def recall(turn: Turn) -> AsyncIterator[AgentEvent]:
    """Follow the question, a script with two more actions: `recall` tells the history as JSON, a list of [role, text,
    ids of the calls or id of the answered call]; `frozen` makes a call whose arguments are a Mapping but not a dict."""
    for action in json.loads(turn.history[-1].content):
        match action:
            case ["recall"]:
                history = [[m.role, m.content, ids_of(m.tool_calls, m.tool_call_id)] for m in turn.history]
                yield TextDelta(json.dumps(history))
            case ["frozen", tool_call_id, arguments]:
                yield ToolCall(tool_call_id, "tool", MappingProxyType(arguments))
            case _:
                async for event in script(replace(turn, history=[HistoryMessage("user", script_of(action))])):
                    yield event


def ids_of(tool_calls: list[dict[str, Any]] | None, tool_call_id: str | None) -> list[str] | str | None:
    """The ids of a message's calls, or of the call that it answers."""
    return tool_call_id if tool_calls is None else [call["id"] for call in tool_calls]
