"""The echo agent: deterministic answers without a model, for tests and load."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from functools import lru_cache
from itertools import chain

from anynode.server.agents.agent import (
    Agent,
    AgentError,
    AgentEvent,
    StepEnd,
    TextDelta,
    ToolCall,
    Turn,
    Usage,
    continues,
    resumes_calls,
)
from anynode.server.agents.tool_calls import ToolRunner
from anynode.server.agents.tools import Tool, make_tool
from anynode.server.settings import ScriptedSteps, Settings

_WORD = re.compile(r"\S+\s*|\s+")  # every character is in exactly one match, so that the words join to the text


async def echo(text: str) -> str:
    """Return the text."""
    return text


def make_echo(settings: Settings, tools: Sequence[Tool] = ()) -> Agent:
    """Make the agent that streams `[n] question` (n: messages given), or `w0 w1 …`, at the speed of the settings.

    Before that it makes the calls of ECHO_TOOL_CALLS. Where there are no `tools`, there is one, `echo`.
    """
    runner = ToolRunner(tools or (make_tool(echo),), settings)
    script = settings.echo_tool_calls
    tokens_per_second = settings.echo_tokens_per_second
    tokens = settings.echo_tokens
    fail_after = settings.echo_fail_after

    @resumes_calls
    @continues
    async def answer(turn: Turn) -> AsyncIterator[AgentEvent]:
        for calls in _calls(turn, script):
            async with aclosing(runner.run(turn, calls)) as events:
                async for event in events:
                    yield event
            yield StepEnd()
        loop = asyncio.get_running_loop()
        start = loop.time()
        streamed = 0
        deltas = map(_numbered, range(tokens)) if tokens else _echo(turn)
        for delta in _after(turn.partial, deltas):
            if tokens_per_second:
                # Due times count from the start, so that lateness is caught up and does not add up.
                delay = start + streamed / tokens_per_second - loop.time()
                if delay > 0:
                    await asyncio.sleep(delay)
            yield delta
            streamed += 1
            if streamed == fail_after:
                raise AgentError(f"the echo agent fails after {fail_after} tokens, as ECHO_FAIL_AFTER asks")
        # Counted by spaces: splitting a history of 1,000 messages takes longer than streaming the answer.
        words = sum(message.content.count(" ") + 1 for message in turn.history)
        yield Usage(input_tokens=words, output_tokens=streamed, model="echo")

    return answer


def _calls(turn: Turn, script: ScriptedSteps) -> Iterator[Sequence[ToolCall]]:
    """Yield the calls that are still to be made, step by step, the pending ones first.

    The ids count through the turn, so that they are the same in every attempt.
    """
    if turn.pending:
        yield turn.pending
    made = {message.tool_call_id for message in turn.steps} | {call.tool_call_id for call in turn.pending}
    number = 0
    for step in script:
        calls = []
        for scripted in step:
            number += 1
            if f"call_{number}" not in made:
                calls.append(ToolCall(f"call_{number}", scripted.name, scripted.arguments))
        if calls:
            yield calls


def _echo(turn: Turn) -> Iterator[TextDelta]:
    words = _WORD.findall(turn.history[-1].content)
    return map(TextDelta, chain((f"[{len(turn.history)}] ",), words))


def _after(partial: str, deltas: Iterator[TextDelta]) -> Iterator[TextDelta]:
    """Yield the deltas behind the text `partial`, which was streamed already."""
    left = len(partial)
    for delta in deltas:
        if left < len(delta.text):
            yield TextDelta(delta.text[left:]) if left else delta
        left = max(0, left - len(delta.text))


@lru_cache(maxsize=10_000)
def _numbered(number: int) -> TextDelta:
    # Kept: making each anew takes three times the CPU of the whole stream.
    return TextDelta(f"w{number} ")
