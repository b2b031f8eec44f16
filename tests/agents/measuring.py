"""An agent that tells what the process in which it runs holds in memory."""

from __future__ import annotations

import gc
import json
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator
from typing import Final

from anynode import AgentEvent, TextDelta, Turn

AGENT: Final = "tests.agents.measuring:measure"
# What is in use is counted: memory that the process has for it is not the same in two runs.
ENVIRONMENT: Final = {"AGENT": AGENT, "PYTHONTRACEMALLOC": "1"}
COUNTED: Final = ("AnynodeConnection", "AiSdkConnection", "Snapshot", "ApiRequest")


async def measure(turn: Turn) -> AsyncIterator[AgentEvent]:
    """Answer with JSON: the memory that is in use, in KiB (`kib`), and how many objects of some types there are.

    The question `uncollected` switches the garbage collector off for good; any other lets it collect first.
    """
    if turn.history[-1].content == "uncollected":
        gc.disable()
    else:
        gc.collect()
    found = Counter(type(each).__name__ for each in gc.get_objects())
    kib = tracemalloc.get_traced_memory()[0] // 1024
    yield TextDelta(json.dumps({"kib": kib, **{name: found[name] for name in COUNTED}}))
