"""The product alone, under faults: what clients notice when a node dies or is deployed."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias
from uuid import UUID

import asyncpg

from bench.clients import Witness
from bench.cost import cost, statements
from bench.load import LoadError
from bench.report import Figure, Target, percentile
from bench.resume import resume
from bench.seen import Seen, Stored, fault_in, longest_gap
from bench.servers import Bench, Server

NODES: Final = 3
TURNS: Final = 60
WATCHERS: Final = 20  # on other nodes, of turns whose node is struck
TOKENS: Final = 600
TOKENS_PER_SECOND: Final = 50
TEXT: Final = "".join(f"w{number} " for number in range(TOKENS))
# How many conversations there are of each length: those that are used, and what an older database holds.
CONVERSATIONS: Final[Mapping[int, int]] = {0: 500, 100: 1000}
STREAMING_SECONDS: Final = (1.0, 2.0)  # how long all turns have streamed when the fault comes
# A takeover may come late in the stream and begins it again; a machine that is too slow for it gives up here.
TURNS_SECONDS_MAX: Final = 90.0
DRAIN_SECONDS: Final = 60.0


@dataclass(frozen=True)
class Scale:
    """The sizes of all measures."""

    rounds: int
    resumes: int
    samples: int  # of a remote turn's beginning, and of each kind of cancel
    lag_seconds: float
    statements_seconds: float
    cost_turns: int  # of each client


DEFAULT: Final = Scale(rounds=3, resumes=300, samples=40, lag_seconds=10.0, statements_seconds=12.0, cost_turns=3)
QUICK: Final = Scale(rounds=1, resumes=100, samples=10, lag_seconds=4.0, statements_seconds=5.0, cost_turns=1)


async def kill(bench: Bench, scale: Scale) -> list[Figure]:
    """Measure `kill -9` of one of three nodes in mid-stream, with the default lease and with a short one."""
    return [
        *await _kill(bench, 5, median=Target("worst", 6), most=Target("worst", 8)),
        *await _kill(bench, 2, median=None, most=Target("worst", 4)),
    ]


async def _kill(bench: Bench, lease_seconds: int, *, median: Target | None, most: Target) -> list[Figure]:
    async def strike(node: Server) -> None:
        node.kill()

    struck = await _strike(bench, strike, LEASE_SECONDS=lease_seconds)
    lease = f"lease {lease_seconds} s"
    return [
        Figure(f"{lease}: gap p50, s", percentile(struck.gaps, 50), median),
        Figure(f"{lease}: gap max, s", max(struck.gaps), most),
        Figure(f"{lease}: gap max of those who watch on other nodes, s", max(struck.watched_gaps), most),
        Figure(f"{lease}: gap max of other turns, s", max(struck.other_gaps)),
        Figure(f"{lease}: turns of living nodes that restarted", struck.other_restarts, Target("worst", 0)),
    ]


async def drain(bench: Bench, scale: Scale) -> list[Figure]:
    """Measure SIGTERM to one of three nodes in mid-stream; the node has time to end its turns."""

    async def strike(node: Server) -> None:
        status = await node.stop(TURNS_SECONDS_MAX)
        if status != 0:
            raise LoadError(f"the drained node exits with status {status}")

    struck = await _strike(bench, strike, DRAIN_SECONDS=DRAIN_SECONDS)
    return [
        Figure("gap p50, s", percentile(struck.gaps, 50)),
        Figure("gap max, s", max(struck.gaps), Target("worst", 0.5)),
        Figure("gap max of those who watch on other nodes, s", max(struck.watched_gaps), Target("worst", 0.5)),
        Figure("gap max of other turns, s", max(struck.other_gaps)),
        Figure("turns that restarted", struck.restarts + struck.other_restarts, Target("worst", 0)),
    ]


@dataclass(frozen=True)
class Struck:
    """A fault as clients saw it; every turn has ended, and is complete at each of them."""

    gaps: Sequence[float]  # of those whose turn ran on the node that was struck
    watched_gaps: Sequence[float]  # of the same turns, at watchers on other nodes
    other_gaps: Sequence[float]
    restarts: int
    other_restarts: int


async def _strike(bench: Bench, strike: Callable[[Server], Awaitable[None]], **environment: object) -> Struck:
    settings = {"ECHO_TOKENS": TOKENS, "ECHO_TOKENS_PER_SECOND": TOKENS_PER_SECOND, **environment}
    async with bench.serve_nodes(NODES, **settings) as nodes:
        ports = [node.port for node in nodes]

        def witness(conversation_id: UUID, first: int, *, is_asking: bool) -> Witness:
            others = ports[first:] + ports[:first]
            return Witness(others, bench.token, conversation_id, is_asking=is_asking)

        ids = bench.conversations[0][:TURNS]
        askers = [witness(one, number % NODES, is_asking=True) for number, one in enumerate(ids)]
        affected = [one for one in askers if one.port == ports[0]]
        watchers = [
            witness(one.conversation_id, 1 + number % (NODES - 1), is_asking=False)
            for number, one in enumerate(affected[:WATCHERS])
        ]
        everybody = askers + watchers
        async with asyncio.timeout(TURNS_SECONDS_MAX), asyncio.TaskGroup() as group:
            for one in everybody:
                group.create_task(one.run())
            for one in everybody:
                await one.began.wait()
            await asyncio.sleep(random.uniform(*STREAMING_SECONDS))
            struck_at = time.monotonic()
            await strike(nodes[0])
        await _check(nodes[-1].database_url, everybody)
    others = [one.seen for one in askers if one not in affected]
    return Struck(
        _gaps([one.seen for one in affected], struck_at),
        _gaps([one.seen for one in watchers], struck_at),
        _gaps(others, struck_at),
        sum(one.seen.restarts > 0 for one in affected),
        sum(seen.restarts > 0 for seen in others),
    )


def _gaps(seen: Sequence[Seen], since: float) -> list[float]:
    return [longest_gap(one.came, since) for one in seen]


async def _check(database_url: str, witnesses: Sequence[Witness]) -> None:
    """Raise LoadError unless every turn has ended, and clients and database hold the same, whole answer."""
    connection = await asyncpg.connect(database_url)
    try:
        rows = await connection.fetch(
            """SELECT c.id, t.status, m.content, c.last_seq,
                      (SELECT array_agg(seq ORDER BY seq) FROM events WHERE conversation_id = c.id) AS seqs
               FROM conversations c JOIN turns t ON t.conversation_id = c.id
               JOIN messages m ON m.turn_id = t.id AND m.role = 'assistant'"""
        )
    finally:
        await connection.close()
    stored = {row["id"]: Stored(row["status"], row["content"], row["last_seq"], row["seqs"]) for row in rows}
    for one in witnesses:
        if one.conversation_id not in stored:
            raise LoadError(f"conversation {one.conversation_id} has no answer in the database")
        if fault := fault_in(one.seen, stored[one.conversation_id], TEXT):
            raise LoadError(f"conversation {one.conversation_id}: {fault}")


Fault: TypeAlias = Callable[[Bench, Scale], Awaitable[list[Figure]]]
FAULTS: Final[Mapping[str, Fault]] = {
    "kill": kill,
    "drain": drain,
    "resume": lambda bench, scale: resume(
        bench, resumes=scale.resumes, samples=scale.samples, lag_seconds=scale.lag_seconds
    ),
    "statements": lambda bench, scale: statements(bench, seconds=scale.statements_seconds),
    "cost": lambda bench, scale: cost(bench, turns=scale.cost_turns),
}
