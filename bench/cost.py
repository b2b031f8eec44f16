"""The cost of streaming for one node and its Postgres: statements a second, and CPU and WAL for each token."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Final

import asyncpg

from bench.load import Chat, open_chats
from bench.measures import STAGGER_SECONDS, TOKENS, TOKENS_PER_SECOND, Stopwatch, ask_all, close_all
from bench.report import Figure, Target
from bench.servers import Bench, Server

FEW: Final = 2
MANY: Final = 100
# An idle backend reports its last transactions after 10 s: wait until the admissions are counted.
SETTLING_SECONDS: Final = 11.0
CORES: Final = 4  # of the Postgres whose capacity is computed
BUSY: Final = 0.7  # the share of these cores that it may use
# (turns at once, FLUSH_INTERVAL_MS)
SETTINGS: Final = ((100, 25), (100, 100), (500, 25), (500, 100))


async def statements(bench: Bench, *, seconds: float) -> list[Figure]:
    """Measure the statements a second of a node that streams 2 turns, then 100. Every statement is a transaction, and
    Postgres counts those. Nothing is subtracted: the beat, the deletions and Postgres' own work are included."""
    settings = {
        "ECHO_TOKENS": 1_000_000,  # no turn ends while it is watched
        "ECHO_TOKENS_PER_SECOND": TOKENS_PER_SECOND,
        "ANSWER_BYTES_MAX": 67_108_864,
    }
    rates = []
    async with bench.serve("product", **settings) as node:
        chats = await open_chats(node.port, bench.token, bench.conversations[0][:MANY])
        asked = []
        for start, end in ((0, 0), (0, FEW), (FEW, MANY)):
            for chat in chats[start:end]:
                asked.append(chat.ask())
                await asyncio.sleep(
                    random.uniform(0, 2 * STAGGER_SECONDS / MANY)
                )  # so that the clients share no rhythm
            await asyncio.sleep(SETTLING_SECONDS)
            rates.append(await _commits_a_second(bench, node, seconds))
        for answer in asked:
            if answer.done():
                answer.result()  # raises an error; an end would be too early
            answer.cancel()
        close_all(chats)
    idle, few, many = rates
    return [
        Figure("idle, a second", idle),
        Figure(f"{FEW} turns, a second", few),
        Figure(f"{MANY} turns, a second", many),
        Figure(f"{MANY} turns / {FEW} turns", many / few, Target("product", 1.5)),
    ]


async def cost(bench: Bench, *, turns: int) -> list[Figure]:
    """Measure the cost of a token in whole turns of 200 tokens, by the number of turns and the flush interval."""
    figures = []
    for clients, interval_ms in SETTINGS:
        figures += await _cost(bench, clients, interval_ms, turns)
    return figures


async def _cost(bench: Bench, clients: int, interval_ms: int, turns: int) -> list[Figure]:
    settings = {
        "ECHO_TOKENS": TOKENS,
        "ECHO_TOKENS_PER_SECOND": TOKENS_PER_SECOND,
        "FLUSH_INTERVAL_MS": interval_ms,
    }
    async with bench.serve("product", **settings) as node:
        chats: list[Chat] = await open_chats(node.port, bench.token, bench.conversations[0][:clients])
        await ask_all(chats, 1, STAGGER_SECONDS)
        rows = await _rows(node)
        wal = await bench.wal_bytes()
        stopwatch = Stopwatch(bench, node)
        await ask_all(chats, turns, STAGGER_SECONDS)
        seconds, cpu, postgres_cpu, own_cpu = stopwatch.stop()
        wal = await bench.wal_bytes() - wal
        rows = await _rows(node) - rows
        close_all(chats)
    count = clients * turns
    tokens = count * TOKENS
    carried = CORES * BUSY / (postgres_cpu / tokens) if postgres_cpu else float("inf")
    name = f"{clients} turns, {interval_ms} ms"
    return [
        Figure(f"{name}: Postgres CPU, µs a token", 1e6 * postgres_cpu / tokens),
        Figure(f"{name}: WAL, bytes a token", wal / tokens),
        Figure(f"{name}: rows a turn of {TOKENS} tokens", rows / count),
        Figure(f"{name}: node CPU, µs a token", 1e6 * cpu / tokens),
        Figure(f"{name}: tokens/s", tokens / seconds),
        Figure(f"{name}: CPU of node, Postgres and generator, cores", (cpu + postgres_cpu + own_cpu) / seconds),
        Figure(f"{name}: tokens/s that {CORES} cores of Postgres carry, {BUSY:.0%} busy", carried),
        Figure(f"{name}: … in turns at {TOKENS_PER_SECOND} tokens/s", carried / TOKENS_PER_SECOND),
    ]


async def _commits_a_second(bench: Bench, node: Server, seconds: float) -> float:
    before, started = await bench.commits(node), time.monotonic()
    await asyncio.sleep(seconds)
    return (await bench.commits(node) - before) / (time.monotonic() - started)


async def _rows(node: Server) -> int:
    connection = await asyncpg.connect(node.database_url)
    try:
        rows: int = await connection.fetchval("SELECT count(*) FROM events")
    finally:
        await connection.close()
    return rows
