"""The sockets that have not authenticated yet: how many of them there may be, and which one has to go. No I/O.

A socket without a token costs its peer nothing, so these sockets have places of their own. They cannot take those of
users, and where all places are taken, the newest socket takes the place of the one that has waited longest. A client
that sends its token at once needs its place for a few milliseconds.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, Protocol, TypeVar


class GivesWay(Protocol):
    """A socket that can be told to make room."""

    def give_way(self) -> None:
        """Close the socket soon, in favour of a newer one."""


Socket = TypeVar("Socket", bound=GivesWay)


class Unauthenticated(Generic[Socket]):
    """All sockets that have not authenticated yet, in the order in which they came."""

    def __init__(self, *, total_max: int, per_address_max: int) -> None:
        self._total_max = total_max
        self._per_address_max = per_address_max
        self._addresses: OrderedDict[Socket, str] = OrderedDict()
        self._by_address: dict[str, OrderedDict[Socket, None]] = {}

    def __len__(self) -> int:
        """Return how many sockets have not authenticated yet."""
        return len(self._addresses)

    def add(self, socket: Socket, address: str) -> str | None:
        """Add a socket. Where its address or the node is at its limit, the one of them that has waited longest gives
        way. Returns the name of the limit, None where none was reached."""
        of_address = self._by_address.get(address, ())
        reached = None
        if len(of_address) >= self._per_address_max:
            reached = "unauthenticated_per_address_max"
            self._remove(next(iter(of_address)))
        elif len(self._addresses) >= self._total_max:
            reached = "unauthenticated_max"
            self._remove(next(iter(self._addresses)))
        self._addresses[socket] = address
        self._by_address.setdefault(address, OrderedDict())[socket] = None
        return reached

    def discard(self, socket: Socket) -> None:
        """Forget a socket that has authenticated or has gone; one that was told to give way is forgotten already."""
        address = self._addresses.pop(socket, None)
        if address is None:
            return
        of_address = self._by_address[address]
        del of_address[socket]
        if not of_address:
            del self._by_address[address]

    def _remove(self, socket: Socket) -> None:
        self.discard(socket)
        socket.give_way()
