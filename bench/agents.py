"""Agents for measurements: `AGENT=bench.agents:timed`, `…:asked` and `…:written`."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator
from functools import cache
from itertools import cycle
from typing import Final

from anynode import TextDelta, Turn
from anynode.server.settings import Settings, read_settings

MARKDOWN: Final = "bench.agents:written"
SECTION: Final = """## What a section of an answer looks like

It begins with a paragraph of **some** length, in which `code` and [a link](https://example.org) stand beside plain
words, since that is how models write when they are asked to explain a thing to somebody who wants to know it well.

- a list with an item of a few words
- another item, which goes on for a little longer than the first one did
- and a third with *emphasis* in it

```python
def merge(left: list[int], right: list[int]) -> list[int]:
    merged = []
    while left and right:
        merged.append((left if left[0] <= right[0] else right).pop(0))
    return merged + left + right
```

| name | time | memory |
|---|---|---|
| merge | O(n) | O(n) |
| sort | O(n log n) | O(n) |

A last paragraph says what was said before, in other words, so that the section is as long as sections are.

"""


async def timed(turn: Turn) -> AsyncIterator[TextDelta]:
    """Yield the time of each token as its text (CLOCK_MONOTONIC in ns); length and speed are the echo agent's."""
    settings = _settings()
    async for text in paced(settings.echo_tokens, settings.echo_tokens_per_second, is_timed=True):
        yield TextDelta(text)


async def asked(turn: Turn) -> AsyncIterator[TextDelta]:
    """Follow the question: for `think 2.5 say 100`, wait 2.5 seconds and then yield 100 tokens."""
    settings = _settings()
    _, seconds, _, tokens = turn.history[-1].content.split()
    await asyncio.sleep(float(seconds))
    async for text in paced(int(tokens), settings.echo_tokens_per_second):
        yield TextDelta(text)


async def written(turn: Turn) -> AsyncIterator[TextDelta]:
    """Write Markdown as models do (paragraphs, lists, code, tables): for the question `20000 200`, 20,000 tokens at 200
    a second."""
    tokens, tokens_per_second = map(int, turn.history[-1].content.split())
    words = cycle(re.findall(r"\S+\s*|\s+", SECTION))
    async for _ in paced(tokens, tokens_per_second):
        yield TextDelta(next(words))


async def paced(tokens: int, tokens_per_second: float, *, is_timed: bool = False) -> AsyncIterator[str]:
    """Yield `w0 w1 …`, or the time of each token, at the echo agent's pace: due times count from the start."""
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
