"""What stands of a turn that is taken over: the steps that were completed, and the step that was cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from server.agents.agent import HistoryMessage, ToolCall, ToolResult
from server.encoding import encode


class _Text(msgspec.Struct):
    text: str


_TEXT = msgspec.json.Decoder(_Text)
_CALL = msgspec.json.Decoder(ToolCall)
_RESULT = msgspec.json.Decoder(ToolResult)


@dataclass(slots=True)
class Step:
    """What one model request has said, and what the tools that it called have answered."""

    texts: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    results: list[ToolResult] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All of its text."""
        return "".join(self.texts)

    @property
    def is_complete(self) -> bool:
        """Whether it has called tools, and all of them have answered; what comes then is the next step."""
        return 0 < len(self.calls) == len(self.results)

    def add_call(self, call: ToolCall) -> None:
        """Raises ValueError where the call is there already."""
        if any(call.tool_call_id == other.tool_call_id for other in self.calls):
            raise ValueError(f"two calls have the id {call.tool_call_id!r}")
        self.calls.append(call)

    def add_result(self, result: ToolResult) -> None:
        """Raises ValueError where no call waits for it."""
        if all(result.tool_call_id != call.tool_call_id for call in self.calls):
            raise ValueError(f"a result of a call that was not made: {result.tool_call_id!r}")
        if any(result.tool_call_id == other.tool_call_id for other in self.results):
            raise ValueError(f"the call {result.tool_call_id!r} is answered twice")
        self.results.append(result)

    def cut(self) -> None:
        """Forget the calls that have no answer, so that what is left is complete."""
        answered = {result.tool_call_id for result in self.results}
        self.calls = [call for call in self.calls if call.tool_call_id in answered]


def tool_calls_json(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    """The calls as a message has them."""
    return [
        {
            "id": call.tool_call_id,
            "type": "function",
            "function": {"name": call.tool_name, "arguments": encode(call.arguments)},
        }
        for call in calls
    ]


def history_of_steps(steps: Sequence[Step]) -> list[HistoryMessage]:
    """The messages that completed steps leave in what the agent sees."""
    messages = []
    for step in steps:
        messages.append(HistoryMessage("assistant", step.text, tool_calls_json(step.calls)))
        messages += [
            HistoryMessage("tool", result.content, None, result.tool_name, result.tool_call_id)
            for result in step.results
        ]
    return messages


def steps_in(journal: Sequence[tuple[str, str]]) -> tuple[list[Step], str]:
    """The completed steps in the events (type, JSON payload) of a turn, and the text of the step that was cut.

    A tool's result stands, with its call and all text before it; a call that has no result does not. Raises ValueError
    where it is no journal of a turn.
    """
    steps: list[Step] = []
    step = Step()

    def complete() -> None:
        nonlocal step
        if step.results:
            step.cut()
            steps.append(step)
            step = Step()

    for type, payload in journal:
        match type:
            case "turn.delta":
                if step.is_complete:
                    complete()
                step.texts.append(_TEXT.decode(payload).text)
            case "turn.tool_call":
                if step.is_complete:
                    complete()
                step.add_call(_CALL.decode(payload))
            case "turn.tool_result":
                step.add_result(_RESULT.decode(payload))
            case "turn.restarted":
                complete()
                said = sum(len(before.text) for before in steps)
                step = Step([_TEXT.decode(payload).text[said:]])
    complete()
    return steps, step.text
