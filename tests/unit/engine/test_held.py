"""What is read for followers and not sent yet: bounded for each user, and forgotten when it is over."""

from __future__ import annotations

import asyncio

from anynode.server.engine.held import Held


class Holding:
    """Followers that hold a piece until they are told to let go."""

    def __init__(self, held: Held) -> None:
        self.held = held
        self.has_piece: list[str] = []
        self.let_go = asyncio.Event()

    async def come(self, user: str) -> asyncio.Task[None]:
        async def hold() -> None:
            async with self.held.piece(user):
                self.has_piece.append(user)
                await self.let_go.wait()

        task = asyncio.create_task(hold())
        await asyncio.sleep(0)
        return task


async def test_a_user_has_so_many_pieces_at_once_and_others_have_theirs() -> None:
    holding = Holding(Held(2))
    tasks = [await holding.come(user) for user in ("ada", "ada", "ada", "bob")]
    assert holding.has_piece == ["ada", "ada", "bob"]
    assert len(holding.held) == 2
    holding.let_go.set()
    await asyncio.gather(*tasks)
    assert holding.has_piece == ["ada", "ada", "bob", "ada"]
    assert len(holding.held) == 0


async def test_one_that_goes_while_it_holds_or_waits_gives_its_place_back() -> None:
    holding = Holding(Held(1))
    first, second, third = [await holding.come("ada") for _ in range(3)]
    for task in (second, first):
        task.cancel()
    await asyncio.wait((first, second))
    holding.let_go.set()
    await third
    assert holding.has_piece == ["ada", "ada"]
    assert len(holding.held) == 0
