"""The limits of one user. The settings say them for everybody, and a token may carry its own."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from msgspec import Meta, Struct

LIMIT_MAX = 1_000_000_000_000  # of any limit; 0 turns one off

Limit: TypeAlias = Annotated[int, Meta(ge=0, le=LIMIT_MAX)]


class UserLimits(Struct, frozen=True, forbid_unknown_fields=True):
    """What one user may have or spend; 0: any number.

    `turns` run at once and `turns_per_minute` begin, on all nodes together. `tokens_per_day` are spent by turns that
    have ended since midnight, UTC. `connections` are the sockets, streams and waiting requests of one node.
    """

    turns: Limit = 0
    turns_per_minute: Limit = 0
    tokens_per_day: Limit = 0
    connections: Limit = 0


UNLIMITED = UserLimits()
