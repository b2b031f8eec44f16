"""Work that something else may cut short: a client that goes, a node that drains, a token that runs out."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

LAST_WORDS_SECONDS: Final = 0.5  # for work whose own end may be what lets a drain be over
Result = TypeVar("Result")


class CutShort(Exception):
    """The work was cancelled before it was done."""


async def run_unless(
    work: Coroutine[Any, Any, Result], *ends: Coroutine[Any, Any, object], grace_seconds: float = 0.0
) -> Result:
    """Return the result of `work`, unless one of `ends` is over first and the grace has passed.

    Then `work` is cancelled and waited for, and CutShort is raised.
    """
    working = asyncio.create_task(work)
    ending = [asyncio.create_task(end) for end in ends]
    try:
        await asyncio.wait((working, *ending), return_when=asyncio.FIRST_COMPLETED)
        if not working.done() and grace_seconds:
            await asyncio.wait((working,), timeout=grace_seconds)
        if not working.done():
            raise CutShort
        return working.result()
    finally:
        for task in (working, *ending):
            task.cancel()
        await asyncio.wait((working, *ending))
