"""What one user may have of the pool: a share, for which others of the user wait in order; and nothing is left."""

from __future__ import annotations

import asyncio

import pytest

from anynode.models.shares import Shares, share_of


@pytest.mark.parametrize(("pool_max", "share"), [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (10, 3), (20, 6), (1000, 300)])
def test_a_share_is_three_tenths_of_the_pool_and_at_least_one(pool_max: int, share: int) -> None:
    assert share_of(pool_max) == share


class Waiting:
    """Statements of one user that wait, and the order in which they get their part."""

    def __init__(self, shares: Shares, count: int) -> None:
        self.got: list[int] = []
        self._shares = shares
        self.tasks = [asyncio.create_task(self._wait(number)) for number in range(count)]

    async def _wait(self, number: int) -> None:
        await self._shares.wait("ada")
        self.got.append(number)


async def waiting(shares: Shares, count: int) -> Waiting:
    made = Waiting(shares, count)
    await asyncio.sleep(0)
    return made


async def test_a_user_takes_the_share_and_no_more_while_others_take_theirs() -> None:
    shares = Shares(2)
    assert [shares.take_now("ada") for _ in range(3)] == [True, True, False]
    assert [shares.take_now("bob") for _ in range(3)] == [True, True, False]


async def test_those_who_wait_go_on_in_the_order_in_which_they_came_one_for_each_that_is_given_back() -> None:
    shares = Shares(1)
    assert shares.take_now("ada")
    asked = await waiting(shares, 3)
    assert asked.got == []
    for number in range(3):
        shares.give("ada")
        await asyncio.sleep(0)
        assert asked.got == list(range(number + 1))
        assert not shares.take_now("ada")


async def test_one_that_is_cancelled_while_it_waits_leaves_its_place_to_the_next() -> None:
    shares = Shares(1)
    assert shares.take_now("ada")
    asked = await waiting(shares, 3)
    asked.tasks[0].cancel()
    await asyncio.wait((asked.tasks[0],))
    shares.give("ada")
    await asyncio.sleep(0)
    assert asked.got == [1]


async def test_one_that_is_cancelled_as_it_gets_its_part_gives_it_to_the_next() -> None:
    shares = Shares(1)
    assert shares.take_now("ada")
    asked = await waiting(shares, 2)
    shares.give("ada")
    asked.tasks[0].cancel()
    await asyncio.wait(asked.tasks)
    assert asked.got == [1]


async def test_nothing_is_kept_of_users_without_a_statement() -> None:
    shares = Shares(1)
    assert shares.take_now("ada")
    assert shares.take_now("bob")
    asked = await waiting(shares, 2)
    asked.tasks[1].cancel()
    await asyncio.wait((asked.tasks[1],))
    shares.give("bob")
    assert len(shares) == 1
    for _ in range(2):
        shares.give("ada")
        await asyncio.sleep(0)
    assert len(shares) == 0
