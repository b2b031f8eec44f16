"""All TCP connections of a process: which one makes room for a new one, and what they hold together."""

from __future__ import annotations

from anynode.server.transport.peers import Peers


class Fake:
    """A connection that notes that it was cut off."""

    def __init__(self) -> None:
        self.is_cut_off = False

    def cut_off(self) -> None:
        """Note it."""
        self.is_cut_off = True


def added(peers: Peers, count: int) -> list[Fake]:
    """New connections."""
    made = [Fake() for _ in range(count)]
    for peer in made:
        peers.add(peer)
    return made


def cut(made: list[Fake]) -> list[int]:
    """Which of these connections were cut off."""
    return [number for number, peer in enumerate(made) if peer.is_cut_off]


def test_the_one_that_is_idle_for_longest_makes_room() -> None:
    peers = Peers(3)
    made = added(peers, 3)
    assert cut(made) == []
    peers.set_busy(made[0])
    peers.set_busy(made[1])
    peers.set_idle(made[1])  # later than the third
    made += added(peers, 1)
    assert cut(made) == [2]
    made += added(peers, 1)
    assert cut(made) == [1, 2]


def test_a_new_one_is_cut_off_where_all_are_busy() -> None:
    peers = Peers(2)
    made = added(peers, 2)
    for peer in made:
        peers.set_busy(peer)
    made += added(peers, 2)
    assert cut(made) == [2, 3]


def test_one_that_is_lost_makes_room_too() -> None:
    peers = Peers(2)
    made = added(peers, 2)
    peers.remove(made[0])
    made += added(peers, 1)
    assert (cut(made), peers.connections) == ([], 2)


def test_bytes_are_counted_in_sum() -> None:
    peers = Peers(2, unfinished_bytes_max=100)
    assert peers.hold(60)
    assert peers.hold(40)
    assert not peers.hold(1)
    assert peers.hold(-50)
    assert peers.unfinished_bytes == 51
