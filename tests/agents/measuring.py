"""An agent that tells what the process in which it runs holds in memory."""

from __future__ import annotations

import ctypes
import gc
import json
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from anynode import AgentEvent, TextDelta, Turn

AGENT: Final = "tests.agents.measuring:measure"
COUNTED: Final = ("AnynodeConnection", "AiSdkConnection", "Snapshot", "ApiRequest")


async def measure(turn: Turn) -> AsyncIterator[AgentEvent]:
    """Answer with JSON: the memory that is in use, in KiB (`kib`), and how many objects of some types there are.

    The question `uncollected` switches the garbage collector off for good; any other lets it collect first.
    """
    if turn.history[-1].content == "uncollected":
        gc.disable()
    else:
        gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    found = Counter(type(each).__name__ for each in gc.get_objects())
    yield TextDelta(json.dumps({"kib": resident_kib(), **{name: found[name] for name in COUNTED}}))


def resident_kib() -> int:
    """Return how much memory this process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4
