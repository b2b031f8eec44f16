"""All that users have open on this node: sockets, streams, and requests that wait for a turn.

Each is a session. It counts towards its user's limit and the node's from `open` until `close`. A session whose token
is revoked is told to end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Receive, Scope, Send

from anynode.server import metrics
from anynode.server.auth import Identity
from anynode.server.errors import RateLimited, Unauthorized

if TYPE_CHECKING:
    from anynode.server.transport.http import AnyApiRequest


class Session:
    """One socket, stream or waiting request of a user. `identity` is what its newest token says; a socket that gets a
    newer token sets it."""

    __slots__ = ("_close", "end", "identity", "is_ending")

    def __init__(self, identity: Identity, end: Callable[[], object], close: Callable[[Session], None]) -> None:
        self.identity = identity
        self.end = end
        self.is_ending = False
        self._close = close

    def close(self) -> None:
        """Count the session no more. Repeating it does nothing."""
        self._close(self)


class Sessions:
    """All sessions of a node, at most `connections_max`, and of each user at most what the user's limits say.

    `is_revoked` says whether a token was revoked since it was verified: a session is opened only after the last word
    about it was heard, or is ended by `end_if`.
    """

    def __init__(self, connections_max: int, is_revoked: Callable[[Identity], bool] = lambda identity: False) -> None:
        self._connections_max = connections_max
        self._is_revoked = is_revoked
        self._sessions: set[Session] = set()
        self._of_user: Counter[str] = Counter()

    def __len__(self) -> int:
        """Return how many sessions are open."""
        return len(self._sessions)

    @property
    def is_full(self) -> bool:
        """Whether the node is at its limit of sessions."""
        return len(self._sessions) >= self._connections_max

    def count_of(self, user_id: str) -> int:
        """Return how many sessions of a user are open."""
        return self._of_user.get(user_id, 0)

    def open(self, identity: Identity, end: Callable[[], object]) -> Session:
        """Count a session from now on, until it is closed. `end` is called, at most once, when its token is revoked.
        Raises RateLimited, or Unauthorized where the token is revoked by now."""
        if self._is_revoked(identity):
            raise Unauthorized("the token was revoked")
        if self.is_full:
            raise RateLimited(
                "This node is at its limit of connections; try again, or ask another node.",
                limit="connections_max",
                limit_max=self._connections_max,
            )
        count_max = identity.limits.connections
        if count_max and self.count_of(identity.user_id) >= count_max:
            raise RateLimited(
                f"You have {count_max} connections and waiting requests on this node; close one of them.",
                limit="connections_per_user_max",
                limit_max=count_max,
            )
        session = Session(identity, end, self._close)
        self._sessions.add(session)
        metrics.sessions.inc()
        self._of_user[identity.user_id] += 1
        return session

    @contextmanager
    def waiting(self, request: AnyApiRequest) -> Iterator[None]:
        """Count a request that waits, while the context lasts. Raises RateLimited."""
        session = self.open(request.identity, request.revoked.set)
        try:
            yield
        finally:
            session.close()

    def streaming(self, request: AnyApiRequest, stream: ASGIApp) -> ASGIApp:
        """Return a response that is counted from now on until it ends. Raises RateLimited."""
        session = self.open(request.identity, request.revoked.set)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await stream(scope, receive, send)
            finally:
                session.close()

        return app

    def end_if(self, is_revoked: Callable[[Identity], bool]) -> int:
        """End all sessions whose identity is revoked: sockets close with 3000, streams and waiting requests end.
        Returns how many were told to end."""
        ending = [session for session in self._sessions if not session.is_ending and is_revoked(session.identity)]
        for session in ending:
            session.is_ending = True
            session.end()
        return len(ending)

    def _close(self, session: Session) -> None:
        if session not in self._sessions:
            return
        self._sessions.remove(session)
        metrics.sessions.dec()
        user_id = session.identity.user_id
        self._of_user[user_id] -= 1
        if not self._of_user[user_id]:
            del self._of_user[user_id]
