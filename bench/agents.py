"""Agents for measuring: `AGENT=bench.agents:timed` and `AGENT=bench.agents:asked`."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from functools import cache

from server.agents.agent import TextDelta, Turn
from server.settings import Settings, read_settings


async def timed(turn: Turn) -> AsyncIterator[TextDelta]:
    """Yields the time of each token as its text (CLOCK_MONOTONIC in ns); length and speed are the echo agent's."""
    settings = _settings()
    async for text in paced(settings.echo_tokens, settings.echo_tokens_per_second, is_timed=True):
        yield TextDelta(text)


async def asked(turn: Turn) -> AsyncIterator[TextDelta]:
    """Does what the question says, such as `think 2.5 say 100`: waits so many seconds, then yields so many tokens."""
    settings = _settings()
    _, seconds, _, tokens = turn.history[-1].content.split()
    await asyncio.sleep(float(seconds))
    async for text in paced(int(tokens), settings.echo_tokens_per_second):
        yield TextDelta(text)


async def paced(tokens: int, tokens_per_second: float, *, is_timed: bool = False) -> AsyncIterator[str]:
    """`w0 w1 …`, or the time of each token, paced as the echo agent does it: due times count from the start."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    for number in range(tokens):
        if tokens_per_second:
            delay = start + number / tokens_per_second - loop.time()
            if delay > 0:
                await asyncio.sleep(delay)
        yield f"{time.monotonic_ns()} " if is_timed else f"w{number} "


@cache
def _settings() -> Settings:
    return read_settings(os.environ)
