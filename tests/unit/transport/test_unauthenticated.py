"""Sockets that have not authenticated: which one gives way, and that no place is lost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from anynode.server.transport.unauthenticated import Unauthenticated


class Waiting:
    """A socket that keeps whether it was told to give way."""

    def __init__(self) -> None:
        self.has_given_way = 0

    def give_way(self) -> None:
        self.has_given_way += 1


def test_the_one_that_has_waited_longest_gives_way_to_a_newer_one() -> None:
    waiting: Unauthenticated[Waiting] = Unauthenticated(total_max=3, per_address_max=3)
    sockets = [Waiting() for _ in range(5)]
    reached = [waiting.add(socket, f"192.0.2.{number}") for number, socket in enumerate(sockets)]
    assert reached == [None, None, None, "unauthenticated_max", "unauthenticated_max"]
    assert [socket.has_given_way for socket in sockets] == [1, 1, 0, 0, 0]
    assert len(waiting) == 3


def test_an_address_that_has_its_share_makes_room_itself() -> None:
    waiting: Unauthenticated[Waiting] = Unauthenticated(total_max=3, per_address_max=2)
    other, *sockets = (Waiting() for _ in range(10))
    waiting.add(other, "192.0.2.1")
    reached = [waiting.add(socket, "192.0.2.2") for socket in sockets]
    assert reached == [None, None] + ["unauthenticated_per_address_max"] * 7
    assert other.has_given_way == 0
    assert [socket.has_given_way for socket in sockets] == [1] * 7 + [0] * 2


def test_one_that_has_authenticated_or_gone_gives_way_to_nobody_and_leaves_its_place() -> None:
    waiting: Unauthenticated[Waiting] = Unauthenticated(total_max=1, per_address_max=1)
    first, second = Waiting(), Waiting()
    waiting.add(first, "192.0.2.1")
    waiting.discard(first)
    waiting.discard(first)
    assert waiting.add(second, "192.0.2.1") is None
    assert first.has_given_way == 0


@given(
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 30), st.sampled_from("abc"))),
    total_max=st.integers(1, 5),
    per_address_max=st.integers(1, 5),
)
def test_the_bounds_hold_and_nothing_is_counted_twice_or_forgotten(
    steps: list[tuple[bool, int, str]], total_max: int, per_address_max: int
) -> None:
    waiting: Unauthenticated[Waiting] = Unauthenticated(total_max=total_max, per_address_max=per_address_max)
    open_: dict[Waiting, str] = {}
    for is_new, number, address in steps:
        if is_new:
            socket = Waiting()
            waiting.add(socket, address)
            open_[socket] = address
        elif open_:
            gone = list(open_)[number % len(open_)]
            waiting.discard(gone)
            del open_[gone]
        for each in [each for each in open_ if each.has_given_way]:
            assert each.has_given_way == 1
            del open_[each]
        assert len(waiting) == len(open_) <= total_max
        assert all(list(open_.values()).count(each) <= per_address_max for each in "abc")
