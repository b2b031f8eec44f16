"""The echo agent: deterministic answers without a model, for tests and load."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from functools import lru_cache
from itertools import chain

from server.agents.agent import Agent, AgentError, AgentEvent, TextDelta, Turn, Usage, continues
from server.settings import Settings

_WORD = re.compile(r"\S+\s*|\s+")  # every character is in exactly one match, so that the words join to the text


def make_echo(settings: Settings) -> Agent:
    """The agent that streams `[n] question` (n: messages given), or `w0 w1 …`, at the speed of the settings."""
    tokens_per_second = settings.echo_tokens_per_second
    tokens = settings.echo_tokens
    fail_after = settings.echo_fail_after

    @continues
    async def answer(turn: Turn) -> AsyncIterator[AgentEvent]:
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


def _echo(turn: Turn) -> Iterator[TextDelta]:
    words = _WORD.findall(turn.history[-1].content)
    return map(TextDelta, chain((f"[{len(turn.history)}] ",), words))


def _after(partial: str, deltas: Iterator[TextDelta]) -> Iterator[TextDelta]:
    """The deltas without those that have been said."""
    left = len(partial)
    for delta in deltas:
        if left < len(delta.text):
            yield TextDelta(delta.text[left:]) if left else delta
        left = max(0, left - len(delta.text))


@lru_cache(maxsize=10_000)
def _numbered(number: int) -> TextDelta:
    # Kept: making each anew takes three times the CPU of the whole stream.
    return TextDelta(f"w{number} ")
