"""Decoding: short texts at once, long ones beside the loop, one at a time, and user by user."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from anynode.server.transport.fair_decoding import AT_ONCE_BYTES_MAX, FairDecoding, UsersInTurn


async def test_only_what_is_long_is_decoded_in_a_thread() -> None:
    decoding = FairDecoding()
    threads = [
        await decoding.decode("ada", "x" * size, lambda text: threading.get_ident())
        for size in (AT_ONCE_BYTES_MAX, AT_ONCE_BYTES_MAX + 1)
    ]
    assert threads[0] == threading.get_ident() != threads[1]


async def test_what_decoding_raises_is_raised_and_the_next_one_goes_on() -> None:
    decoding = FairDecoding()

    def refuse(text: str) -> str:
        raise KeyError("broken")

    for size in (1, AT_ONCE_BYTES_MAX + 1):
        with pytest.raises(KeyError):
            await decoding.decode("ada", "x" * size, refuse)
    assert await decoding.decode("ada", "x" * (AT_ONCE_BYTES_MAX + 1), len) == AT_ONCE_BYTES_MAX + 1


async def test_after_a_long_text_the_loop_has_twice_its_time_to_itself() -> None:
    decoding, began = FairDecoding(), list[float]()

    def decode(text: str) -> None:
        began.append(time.monotonic())
        time.sleep(0.01)  # what is measured takes at least this long

    await asyncio.gather(*(decoding.decode(user, "x" * 20_000, decode) for user in ("ada", "bob")))
    assert began[1] - began[0] >= 0.029  # a timer may ring a little early


class Order:
    """Users that come one after another, and the order in which they are let in. Each leaves when it is told."""

    def __init__(self) -> None:
        self.turns = UsersInTurn()
        self.entered: list[str] = []
        self._left: dict[str, asyncio.Event] = {}

    async def come(self, user: str, name: str) -> asyncio.Task[None]:
        async def pass_through() -> None:
            await self.turns.wait_turn(user)
            try:
                self.entered.append(name)
                await self._left.setdefault(name, asyncio.Event()).wait()
            finally:
                self.turns.end_turn()

        task = asyncio.create_task(pass_through())
        await asyncio.sleep(0)
        return task

    async def leave_all(self, *tasks: asyncio.Task[None]) -> None:
        done = 0
        while done < len(self.entered):
            self._left[self.entered[done]].set()
            done += 1
            for _ in range(3):
                await asyncio.sleep(0)
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_user_that_waits_many_times_delays_another_by_one_turn() -> None:
    order = Order()
    tasks = [await order.come("ada", f"ada {number}") for number in range(5)]
    tasks += [await order.come("bob", f"bob {number}") for number in range(2)]
    assert order.entered == ["ada 0"]
    await order.leave_all(*tasks)
    assert order.entered == ["ada 0", "ada 1", "bob 0", "ada 2", "bob 1", "ada 3", "ada 4"]


async def test_one_that_is_cancelled_while_it_waits_lets_the_next_one_in() -> None:
    order = Order()
    tasks = [await order.come("ada", f"ada {number}") for number in range(4)]
    tasks[1].cancel()
    await asyncio.sleep(0)
    await order.leave_all(*tasks)
    assert order.entered == ["ada 0", "ada 2", "ada 3"]


async def test_one_that_is_cancelled_just_when_its_turn_comes_hands_it_on() -> None:
    order = Order()
    tasks = [await order.come("ada", f"ada {number}") for number in range(3)]
    order.turns.end_turn()  # as the first does when it leaves
    tasks[1].cancel()  # before it can run
    for _ in range(3):
        await asyncio.sleep(0)
    assert order.entered == ["ada 0", "ada 2"]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
