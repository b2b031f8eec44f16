"""Turns: the leases that keep them, taking over those that lapsed, asking them to stop."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

import asyncpg

from anynode.models.database import Database


@dataclass(frozen=True, slots=True)
class TurnRef:
    """Where a turn of a user is. `first_seq` is the seq of its first event, None when its events have been deleted."""

    user_id: str
    conversation_id: UUID
    turn_id: UUID
    first_seq: int | None


@dataclass(frozen=True, slots=True)
class TakenTurn:
    """A turn that this node has taken over; `seq` is that of the `turn.restarted` that says so. What stands of the turn
    is the `text` that it shows, and in `journal` the events (type, JSON payload) that said it, tools included."""

    turn_id: UUID
    conversation_id: UUID
    user_id: str
    epoch: int
    seq: int
    text: str
    journal: Sequence[tuple[str, str]]
    cancel_requested: bool
    is_exhausted: bool  # too many nodes have died of it


@dataclass(frozen=True, slots=True)
class News:
    """What a watch has found: turns of this node `to_cancel`, conversations (id → last seq) in which turns have
    `begun`, or that are deleted, and the `horizon` from which the next watch goes on."""

    horizon: int
    to_cancel: Sequence[UUID]
    begun: Mapping[UUID, int]


async def watch(database: Database, *, node: str, since: int | None, limit: int, within_seconds: float) -> News:
    """Look what other nodes have done. `since`: the horizon of an earlier watch. Raises Unavailable."""
    (row,) = await database.fetch("watch", node, since, limit, within_seconds=within_seconds, line="watch")
    begun = dict(zip(row["ids"] or (), row["last_seqs"] or (), strict=True))
    return News(row["horizon"], row["cancelled"], begun)


async def renew_leases(
    database: Database, claims: Mapping[UUID, int], *, lease_seconds: float, within_seconds: float
) -> dict[UUID, bool]:
    """Renew the leases of turns (id → epoch). Returns those still held, and whether each is to be cancelled."""
    rows = await database.fetch(
        "renew",
        list(claims),
        list(claims.values()),
        lease_seconds,
        within_seconds=within_seconds,
        attempt_seconds=max(0.5, within_seconds / 4),  # one silent connection must not cost the leases
        line="beat",
    )
    return {row["id"]: row["cancel_requested"] for row in rows}


async def release_leases(database: Database, claims: Mapping[UUID, int]) -> None:
    """Let other nodes have these turns (id → epoch) at once."""
    await database.fetch("release", list(claims), list(claims.values()), within_seconds=2.0, line="beat")


async def take_over(
    database: Database,
    *,
    node: str,
    known: Collection[UUID],
    lease_seconds: float,
    beat_seconds: float,
    limit: int,
    max_attempts: int,
    standing: Sequence[str],
    within_seconds: float,
    on_sent: Callable[[], object],
) -> list[TakenTurn]:
    """Make at most `limit` turns with lapsed leases this node's own, under the next epoch; and those that are its own
    already, but not `known` to it and not renewed for two beats. They stand up to their last event of a type in
    `standing`. Not on the beat's line: renewals must not wait for it. Raises Unavailable."""
    arguments = (node, list(known), lease_seconds, limit, max_attempts, list(standing), 2 * beat_seconds)
    rows = await database.fetch("take_over", *arguments, within_seconds=within_seconds, on_sent=on_sent)
    return [
        TakenTurn(
            turn_id=row["turn_id"],
            conversation_id=row["conversation_id"],
            user_id=row["user_id"],
            epoch=row["epoch"],
            seq=row["seq"],
            text=row["text"],
            journal=list(zip(row["types"] or (), row["payloads"] or (), strict=True)),
            cancel_requested=row["cancel_requested"],
            is_exhausted=row["is_exhausted"],
        )
        for row in rows
    ]


async def request_cancel(
    database: Database, user_id: str, conversation_id: UUID, turn_id: UUID | None
) -> list[UUID | None]:
    """Ask for a turn to be stopped (None: the running one). Returns its id, or None in its place where there is no
    such turn; nothing: not this user's conversation."""
    rows = await database.fetch("request_cancel", user_id, conversation_id, turn_id)
    return [row["id"] for row in rows]


async def delete_expired_events(database: Database, *, retention_seconds: float, limit: int) -> int:
    """Delete the events of at most `limit` turns that ended longer ago than that. Returns how many turns."""
    return len(await database.fetch("delete_expired_events", retention_seconds, limit))


async def delete_expired_messages(database: Database, *, retention_seconds: float, limit: int) -> int:
    """Delete at most `limit` events of messages that came without a turn longer ago than that. Returns how many."""
    return len(await database.fetch("delete_expired_messages", retention_seconds, limit))


async def forget_deletions(database: Database, *, after_seconds: float) -> None:
    """Forget the conversations that were deleted longer ago than that."""
    await database.fetch("forget_deletions", after_seconds)


async def read_turn(
    database: Database, user_id: str, conversation_id: UUID, turn_id: UUID
) -> Sequence[asyncpg.Record] | None:
    """A row for each message that answered in the turn, in order, or one without a message. None: no such turn, or not
    this user's. Raises Unavailable."""
    return await database.fetch("read_turn", user_id, conversation_id, turn_id) or None


async def find_turn(database: Database, user_id: str, turn_id: UUID) -> TurnRef | None:
    """Return a turn by its id alone, None where there is no such turn of this user. Raises Unavailable."""
    rows = await database.fetch("find_turn", user_id, turn_id)
    return TurnRef(user_id, rows[0]["conversation_id"], turn_id, rows[0]["first_seq"]) if rows else None


async def read_usage(database: Database, turn_ids: Collection[UUID]) -> dict[UUID, str]:
    """What turns that have ended cost, by their ids, JSON. Raises Unavailable."""
    rows = await database.fetch("read_usage", list(turn_ids)) if turn_ids else ()
    return {row["id"]: row["usage"] for row in rows}
