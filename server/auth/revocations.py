"""The revocations that a node has heard of: from when on a user's tokens must have been issued to be good.

`anynode revoke`, and the deletion of a user, write a row with the database's time. A node reads all rows before its
first statement, and hears of new ones with each watch, every 250 ms. It refuses the tokens, and ends what is open. So
tokens stop working on every node within 250 ms and the time of one statement; at most 2 seconds, after which a watch
that has not been answered is given up. What may come in between:

- **A node has not heard yet.** It admits messages, and accepts new connections, until it hears; then it ends them.
- **A token is verified while the news arrives.** The check is the last step of `Authenticator.authenticate`. What is
  opened later than that, a stream after a slow body, is checked again when it is opened.
- **A ticket was issued before and is redeemed after.** The statement that redeems it compares it with the row: a ticket
  is refused as soon as the revocation is committed, on every node.
- **A node is cut off from Postgres, or frozen.** It can serve nothing meanwhile but what is on its way to clients.
  Afterwards its watch finds a gap (see `Horizon`), and it reads all rows again. What its clients had sent by then may
  still be done: that much of a revocation is late, not lost.
- **A node starts later, or Postgres comes later.** It runs no statement for a client before it has read all rows
  (`check` of `Database.connect`). Connections that were accepted before are ended there.
- **Postgres fails over to a server that has lost the row.** Nodes that have heard of it keep it; others never hear. As
  every commit, a revocation is as safe as Postgres.

Tokens say when they were issued by the clock of their issuer, many of them in whole seconds. A token of the same second
as a revocation was issued before it, as far as anybody can tell, and is refused: log in a second later. Where the
issuer's clock is ahead, tokens that were issued by so much before the revocation are good.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from anynode.models.revocations import ALL_USERS, user_hash
from anynode.server.auth.tokens import Identity


def _nothing() -> None:
    pass


class Revocations:
    """The times (Unix seconds) since when tokens must have been issued, by the hash of their user. No I/O.

    `on_news` is called after each change. A revocation is never taken back: the later one of a user counts. A node
    keeps about 200 bytes for each user whose tokens were revoked within REVOCATIONS_KEPT_SECONDS.
    """

    def __init__(self, on_news: Callable[[], object] = _nothing) -> None:
        self.on_news = on_news
        self._not_before: dict[str, float] = {}

    def hear(self, news: Mapping[str, float]) -> None:
        """Take revocations from Postgres; those that are known already are no news."""
        later = {hash: at for hash, at in news.items() if at > self._not_before.get(hash, 0.0)}
        if later:
            self._not_before |= later
            self.on_news()

    def is_revoked(self, identity: Identity) -> bool:
        """Return whether the token was issued before a revocation of its user, or of all users."""
        if not self._not_before:
            return False
        of_user = self._not_before.get(user_hash(identity.user_id), 0.0)
        return identity.issued_at < max(of_user, self._not_before.get(ALL_USERS, 0.0))
