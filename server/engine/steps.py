"""What stands of a turn that is taken over: the steps that were completed, and the step that was cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from anynode.server.agents.agent import Agent, HistoryMessage, ToolCall, ToolResult, can_continue, can_resume_calls
from anynode.server.agents.tool_calls import messages_of


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

    def cut(self) -> list[ToolCall]:
        """Forget the calls that have no answer, so that what is left is complete. Returns them."""
        answered = {result.tool_call_id for result in self.results}
        calls, self.calls = self.calls, [call for call in self.calls if call.tool_call_id in answered]
        return [call for call in calls if call.tool_call_id not in answered]


def standing_events(agent: Agent) -> list[str]:
    """The types of events up to the last of which a turn of this agent stands when it is taken over."""
    if can_continue(agent):
        return ["turn.delta", "turn.tool_call", "turn.tool_result", "turn.restarted"]
    return ["turn.tool_call", "turn.tool_result"] if can_resume_calls(agent) else ["turn.tool_result"]


def history_of_steps(steps: Sequence[Step]) -> list[HistoryMessage]:
    """The messages that completed steps leave in what the agent sees."""
    return [message for step in steps for message in messages_of(step.text, step.calls, step.results)]


def steps_in(journal: Sequence[tuple[str, str]]) -> tuple[list[Step], str, list[ToolCall]]:
    """The completed steps in the events (type, JSON payload) of a turn, the text of the step that was cut, and its
    calls that have no result.

    A tool's result stands, with its call and all text before it. Where it was not the only call of its step, that step
    is completed without the others, and they are pending with no text. Raises ValueError where it is no journal of a
    turn.
    """
    steps: list[Step] = []
    step = Step()
    pending: list[ToolCall] = []  # of steps that were cut; those that were called again since are in `step`

    def complete() -> None:
        nonlocal step
        if step.results:
            pending.extend(step.cut())
            steps.append(step)
            step = Step()

    for type, payload in journal:
        match type:
            case "turn.delta":
                if step.is_complete:
                    complete()
                text = _TEXT.decode(payload).text
                step.texts.append(text)
                if not step.calls:  # the agent has gone on without them
                    pending.clear()
            case "turn.tool_call":
                if step.is_complete:
                    complete()
                call = _CALL.decode(payload)
                step.add_call(call)
                if any(call.tool_call_id == other.tool_call_id for other in pending):
                    pending = [other for other in pending if other.tool_call_id != call.tool_call_id]
                else:
                    pending.clear()
            case "turn.tool_result":
                step.add_result(_RESULT.decode(payload))
            case "turn.restarted":
                text = _TEXT.decode(payload).text
                if step.results:  # what it said behind the last of them was taken back
                    step.texts = [text[sum(len(before.text) for before in steps) :]]
                complete()
                # Those that the attempt before did not live to call again come first.
                pending.extend(step.calls)
                step = Step([text[sum(len(before.text) for before in steps) :]])
    complete()
    return steps, step.text, [*pending, *step.calls]
