"""Work that something else may cut short."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from anynode.server.transport import cut_short
from anynode.server.transport.cut_short import CutShort
from tests.kit.asgi import WAIT_SECONDS_MAX


class Work:
    """Work that is done when the test says so, and that says whether it was cancelled."""

    def __init__(self) -> None:
        self.done = asyncio.Event()
        self.is_cancelled = False

    async def run(self) -> str:
        try:
            await self.done.wait()
            return "result"
        except asyncio.CancelledError:
            self.is_cancelled = True
            raise


async def run_unless(work: Coroutine[Any, Any, Any], *ends: Coroutine[Any, Any, Any], **options: float) -> Any:
    """Do as the function that is tested does, and fail where it hangs."""
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        return await cut_short.run_unless(work, *ends, **options)


async def test_work_that_comes_to_its_end_gives_its_result_and_cancels_what_could_have_cut_it() -> None:
    work, end = Work(), Work()
    work.done.set()
    assert await run_unless(work.run(), end.run()) == "result"
    assert end.is_cancelled


async def test_an_error_of_the_work_is_raised() -> None:
    async def fail() -> None:
        raise KeyError("broken")

    with pytest.raises(KeyError):
        await run_unless(fail(), asyncio.Event().wait())


async def test_work_is_cancelled_and_waited_for_when_one_of_the_ends_comes_first() -> None:
    work, end, other = Work(), Work(), Work()
    end.done.set()
    with pytest.raises(CutShort):
        await run_unless(work.run(), other.run(), end.run())
    assert work.is_cancelled
    assert other.is_cancelled


async def test_work_that_is_done_at_the_same_moment_counts() -> None:
    work, end = Work(), Work()
    work.done.set()
    end.done.set()
    assert await run_unless(work.run(), end.run()) == "result"


async def test_work_that_ends_within_the_grace_counts() -> None:
    work = Work()

    async def end() -> None:
        asyncio.get_running_loop().call_soon(asyncio.get_running_loop().call_soon, work.done.set)

    assert await run_unless(work.run(), end(), grace_seconds=5.0) == "result"


async def test_work_that_does_not_end_within_the_grace_is_cut_short() -> None:
    work, end = Work(), Work()
    end.done.set()
    with pytest.raises(CutShort):
        await run_unless(work.run(), end.run(), grace_seconds=0.001)
    assert work.is_cancelled


async def test_whoever_is_cancelled_while_waiting_cancels_the_work_and_the_ends() -> None:
    work, end = Work(), Work()
    waiting = asyncio.create_task(run_unless(work.run(), end.run()))
    for _ in range(3):
        await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert work.is_cancelled
    assert end.is_cancelled
