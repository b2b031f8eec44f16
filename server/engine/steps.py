"""What a takeover keeps of a turn: the completed steps, and the text and calls of the step that was cut. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from anynode.server.agents.agent import Agent, HistoryMessage, ToolCall, ToolResult, can_continue, can_resume_calls
from anynode.server.agents.tool_calls import messages_of
from anynode.server.engine.turn_events import TurnCalled, TurnDelta, TurnRestarted, decode_event


@dataclass(slots=True)
class Step:
    """One model request of a turn: its text, its tool calls, and their results."""

    texts: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    results: list[ToolResult] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The whole text of the step."""
        return "".join(self.texts)

    @property
    def is_complete(self) -> bool:
        """Whether the step has calls and all of them have results. Whatever comes next belongs to the next step."""
        return 0 < len(self.calls) == len(self.results)

    def add_call(self, call: ToolCall) -> None:
        """Add a call. Raises ValueError if the step has a call with its id."""
        if any(call.tool_call_id == other.tool_call_id for other in self.calls):
            raise ValueError(f"two calls have the id {call.tool_call_id!r}")
        self.calls.append(call)

    def add_result(self, result: ToolResult) -> None:
        """Add a result. Raises ValueError if no call of the step waits for it."""
        if all(result.tool_call_id != call.tool_call_id for call in self.calls):
            raise ValueError(f"a result of a call that was not made: {result.tool_call_id!r}")
        if any(result.tool_call_id == other.tool_call_id for other in self.results):
            raise ValueError(f"the call {result.tool_call_id!r} is answered twice")
        self.results.append(result)

    def cut(self) -> list[ToolCall]:
        """Remove and return the calls without a result, so that the step is complete."""
        answered = {result.tool_call_id for result in self.results}
        calls, self.calls = self.calls, [call for call in self.calls if call.tool_call_id in answered]
        return [call for call in calls if call.tool_call_id not in answered]


def stands_up_to(agent: Agent) -> list[str]:
    """Return the types of events that a takeover keeps: a turn of this agent stands up to the last event of them."""
    if can_continue(agent):
        return ["turn.delta", "turn.tool_call", "turn.tool_result", "turn.restarted"]
    return ["turn.tool_call", "turn.tool_result"] if can_resume_calls(agent) else ["turn.tool_result"]


def history_of_steps(steps: Sequence[Step]) -> list[HistoryMessage]:
    """Return completed steps as the messages that the agent is given."""
    return [message for step in steps for message in messages_of(step.text, step.calls, step.results)]


def steps_in(journal: Sequence[tuple[str, str]]) -> tuple[list[Step], str, list[ToolCall]]:
    """Return the completed steps in a turn's events (type, JSON payload), the text of the step that was cut, and the
    calls of that step that have no result.

    A tool's result is kept, with its call and all text before it. If its step has calls without results, the step is
    completed without them, and they are returned as pending, with no text. Raises ValueError if the events are not the
    journal of a turn.
    """
    steps: list[Step] = []
    step = Step()
    pending: list[ToolCall] = []  # calls of steps that were cut; those that were made again since are in `step`

    def complete() -> None:
        nonlocal step
        if step.results:
            pending.extend(step.cut())
            steps.append(step)
            step = Step()

    for type, payload in journal:
        match decode_event(type, payload):
            case TurnDelta(text):
                if step.is_complete:
                    complete()
                step.texts.append(text)
                if not step.calls:  # the agent went on without the pending calls
                    pending.clear()
            case TurnCalled(tool_call_id, tool_name) as called:
                if step.is_complete:
                    complete()
                call = ToolCall(tool_call_id, tool_name, called.decoded_arguments())
                step.add_call(call)
                if any(call.tool_call_id == other.tool_call_id for other in pending):
                    pending = [other for other in pending if other.tool_call_id != call.tool_call_id]
                else:
                    pending.clear()
            case ToolResult() as result:
                step.add_result(result)
            case TurnRestarted(text):
                if step.results:  # the text after the last result was taken back
                    step.texts = [text[sum(len(before.text) for before in steps) :]]
                complete()
                # Calls that the last attempt did not make again come first.
                pending.extend(step.calls)
                step = Step([text[sum(len(before.text) for before in steps) :]])
    complete()
    return steps, step.text, [*pending, *step.calls]
