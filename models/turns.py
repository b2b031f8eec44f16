"""Turns: the leases that keep them, taking over those that lapsed, asking them to stop."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from uuid import UUID

import asyncpg

from anynode.models.database import Database
from anynode.models.queries import bind


@dataclass(frozen=True, slots=True)
class TurnRef:
    """Where a turn of a user is. `first_seq` is the seq of its first event, None when its events have been deleted."""

    user_id: str
    conversation_id: UUID
    turn_id: UUID
    first_seq: int | None


@dataclass(frozen=True, slots=True)
class TakenTurn:
    """A turn that this node has taken over; `seq` is the seq of the `turn.restarted` that says so.

    `text` is the text that the turn still shows. `standing_events` are the events (type, JSON payload) that it stands
    on, tools included.
    """

    turn_id: UUID
    conversation_id: UUID
    user_id: str
    epoch: int
    seq: int
    text: str
    standing_events: Sequence[tuple[str, str]]
    cancel_requested: bool
    is_exhausted: bool  # too many nodes have died while running it
    agent_is_gone: bool  # its agent was a function in the process that ran it


@dataclass(frozen=True, slots=True)
class CancelRequest:
    """The turn that was asked to stop, None where there is none. `last_seq` is the last seq of the conversation's
    journal at an instant at which the turn ran: its end comes later. None: it had ended already."""

    turn_id: UUID | None
    last_seq: int | None


@dataclass(frozen=True, slots=True)
class News:
    """The findings of a watch: turns of this node `to_cancel`, conversations (id → last seq) in which turns have
    `begun` or that were deleted, revocations (hash of the user's id → not before), and the `horizon` from which the
    next watch goes on."""

    horizon: int
    to_cancel: Sequence[UUID]
    begun: Mapping[UUID, int]
    revoked: Mapping[str, float] = field(default_factory=dict)


async def watch(database: Database, *, node: str, since: int | None, limit: int, within_seconds: float) -> News:
    """Read what other nodes have done since the horizon of an earlier watch; None begins there. Raises Unavailable."""
    news = bind("watch", node=node, horizon=since, changes_max=limit)
    (row,) = await database.run(news, within_seconds=within_seconds, line="watch")
    begun = dict(zip(row["ids"] or (), row["last_seqs"] or (), strict=True))
    revoked = dict(zip(row["hashes"] or (), row["not_befores"] or (), strict=True))
    return News(row["horizon"], row["cancelled"], begun, revoked)


async def renew_leases(
    database: Database, claims: Mapping[UUID, int], *, lease_seconds: float, within_seconds: float
) -> dict[UUID, bool]:
    """Renew the leases of turns (id → epoch). Returns those still held, and whether each is to be cancelled.

    Raises Unavailable.
    """
    rows = await database.run(
        bind("renew", turn_ids=list(claims), epochs=list(claims.values()), lease_seconds=lease_seconds),
        within_seconds=within_seconds,
        attempt_seconds=max(0.5, within_seconds / 4),  # one silent connection must not cost the leases
        line="beat",
    )
    return {row["id"]: row["cancel_requested"] for row in rows}


async def release_leases(database: Database, claims: Mapping[UUID, int]) -> None:
    """Let other nodes have these turns (id → epoch) at once. Raises Unavailable."""
    released = bind("release", turn_ids=list(claims), epochs=list(claims.values()))
    await database.run(released, within_seconds=2.0, line="beat")


async def take_over(
    database: Database,
    *,
    node: str,
    known: Collection[UUID],
    lease_seconds: float,
    beat_seconds: float,
    limit: int,
    max_attempts: int,
    stands_up_to: Sequence[str],
    within_seconds: float,
    on_sent: Callable[[], object],
    conversation_id: UUID | None = None,
) -> list[TakenTurn]:
    """Make at most `limit` turns with lapsed leases this node's own, under the next epoch.

    Turns that are its own already are taken too, if they are not `known` to it and were not renewed for two beats. A
    turn stands up to its last event of a type in `stands_up_to`. With a `conversation_id`, only a turn of it that a
    `Store` has run is taken. Raises Unavailable.
    """
    lapsed = bind(
        "take_over",
        node=node,
        known=list(known),
        lease_seconds=lease_seconds,
        turns_max=limit,
        attempts_max=max_attempts,
        stands_up_to=list(stands_up_to),
        two_beats_seconds=2 * beat_seconds,
        conversation_id=conversation_id,
    )
    # Not on the beat's line: renewals must not wait for it.
    rows = await database.run(lapsed, within_seconds=within_seconds, on_sent=on_sent)
    return [
        TakenTurn(
            turn_id=row["turn_id"],
            conversation_id=row["conversation_id"],
            user_id=row["user_id"],
            epoch=row["epoch"],
            seq=row["seq"],
            text=row["text"],
            standing_events=list(zip(row["types"] or (), row["payloads"] or (), strict=True)),
            cancel_requested=row["cancel_requested"],
            is_exhausted=row["is_exhausted"],
            agent_is_gone=row["agent_is_gone"],
        )
        for row in rows
    ]


async def request_cancel(
    database: Database, user_id: str, conversation_id: UUID, turn_id: UUID | None
) -> CancelRequest | None:
    """Ask for a turn to be stopped (None: the running one). Returns None where it is not this user's conversation.
    Raises Unavailable."""
    asked = bind("request_cancel", user_id=user_id, conversation_id=conversation_id, turn_id=turn_id)
    rows = await database.run(asked)
    return CancelRequest(rows[0]["id"], rows[0]["last_seq"]) if rows else None


async def delete_expired_events(database: Database, *, retention_seconds: float, limit: int) -> int:
    """Delete the events of at most `limit` turns that ended more than `retention_seconds` ago. Returns how many turns.

    Raises Unavailable.
    """
    return len(await database.run(bind("delete_expired_events", retention_seconds=retention_seconds, turns_max=limit)))


async def delete_expired_messages(database: Database, *, retention_seconds: float, limit: int) -> int:
    """Delete at most `limit` events of messages that came without a turn, more than `retention_seconds` ago. Returns
    how many. Raises Unavailable."""
    expired = bind("delete_expired_messages", retention_seconds=retention_seconds, events_max=limit)
    return len(await database.run(expired))


async def forget_deletions(database: Database, *, after_seconds: float) -> None:
    """Forget the conversations that were deleted more than `after_seconds` ago. Raises Unavailable."""
    await database.run(bind("forget_deletions", after_seconds=after_seconds))


async def read_turn(
    database: Database, user_id: str, conversation_id: UUID, turn_id: UUID
) -> Sequence[asyncpg.Record] | None:
    """Return a row for each message that answered in the turn, in order, or one row without a message.

    None: there is no such turn, or it is not this user's. Raises Unavailable.
    """
    turn = bind("read_turn", user_id=user_id, conversation_id=conversation_id, turn_id=turn_id)
    return await database.run(turn) or None


async def find_turn(database: Database, user_id: str, turn_id: UUID) -> TurnRef | None:
    """Find a turn by its id alone. None: there is no such turn, or it is not this user's. Raises Unavailable."""
    rows = await database.run(bind("find_turn", user_id=user_id, turn_id=turn_id))
    return TurnRef(user_id, rows[0]["conversation_id"], turn_id, rows[0]["first_seq"]) if rows else None


async def read_usage(database: Database, turn_ids: Collection[UUID]) -> dict[UUID, str]:
    """Return the usage (JSON) of turns that have ended, by their ids. Raises Unavailable."""
    rows = await database.run(bind("read_usage", turn_ids=list(turn_ids))) if turn_ids else ()
    return {row["id"]: row["usage"] for row in rows}
