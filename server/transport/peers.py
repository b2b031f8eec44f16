"""All TCP connections of a process: how many there are, which of them are idle, and what they hold together. No I/O."""

from __future__ import annotations

from typing import Final, Protocol

UNFINISHED_BYTES_MAX: Final = 134_217_728  # of WebSocket messages that have come in part, of all connections together
HTTP_CONNECTIONS_MAX: Final = 2_000  # TCP connections beyond those of WebSockets: requests, streams, and idle ones


class Peer(Protocol):
    """A connection that can be cut off."""

    def cut_off(self) -> None:
        """End the connection."""


class Peers:
    """What all peers of a process use together, bounded.

    At the bound of connections the one that has been idle for longest makes room for a new one. If all of them are
    busy, the new one is cut off.
    """

    def __init__(self, connections_max: int, unfinished_bytes_max: int = UNFINISHED_BYTES_MAX) -> None:
        self.connections_max = connections_max
        self.unfinished_bytes_max = unfinished_bytes_max
        self.unfinished_bytes = 0
        self.connections = 0
        self._idle: dict[Peer, None] = {}  # in the order in which they became idle

    def add(self, peer: Peer) -> None:
        """Count a new connection, which is idle."""
        self.connections += 1
        if self.connections > self.connections_max:
            longest = next(iter(self._idle), peer)
            self._idle.pop(longest, None)
            longest.cut_off()
            if longest is peer:
                return
        self._idle[peer] = None

    def remove(self, peer: Peer) -> None:
        """Forget a connection that is lost."""
        self.connections -= 1
        self._idle.pop(peer, None)

    def set_idle(self, peer: Peer) -> None:
        """Note that a connection waits for a request from now on."""
        self._idle[peer] = None

    def set_busy(self, peer: Peer) -> None:
        """Note that a connection has a request in progress, or has become a WebSocket."""
        self._idle.pop(peer, None)

    def hold(self, more_bytes: int) -> bool:
        """Count bytes of messages that have come in part; a negative number lets go of some.

        Return whether all connections together hold no more than they may.
        """
        self.unfinished_bytes += more_bytes
        return self.unfinished_bytes <= self.unfinished_bytes_max
