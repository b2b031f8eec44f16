"""The measures. Each runs one side once and returns its figures."""

from __future__ import annotations

import asyncio
import os
import time
from array import array
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import psutil

from bench.load import Chat, Connection, connect_many, open_chats
from bench.report import Figure, Target, percentile
from bench.servers import Bench, Server, Side

HISTORIES: Final = (0, 10, 100, 1000)
CLIENTS: Final = 100
TOKENS: Final = 200
TOKENS_PER_SECOND: Final = 50
STAGGER_SECONDS: Final = 1.0  # clients do not ask in the same instant


@dataclass(frozen=True)
class Scale:
    """The sizes of all measures."""

    rounds: int
    paced_turns: int  # of each client
    paced_warm_up_turns: int
    burst_turns: int
    samples: int  # of the first token, for each history
    warm_up_samples: int
    connections: Sequence[int]
    flush_turns: int
    flush_seconds: float

    @property
    def conversations(self) -> Mapping[int, int]:
        """Return how many conversations of each length the measures need."""
        samples = dict.fromkeys(HISTORIES, self.samples + self.warm_up_samples)
        return samples | {0: max(samples[0], self.flush_turns, CLIENTS)}


DEFAULT: Final = Scale(
    rounds=5,
    paced_turns=2,
    paced_warm_up_turns=1,
    burst_turns=8,
    samples=100,
    warm_up_samples=20,
    connections=(1000, 5000),
    flush_turns=1000,
    flush_seconds=15.0,
)
QUICK: Final = Scale(
    rounds=1,
    paced_turns=1,
    paced_warm_up_turns=0,
    burst_turns=3,
    samples=50,
    warm_up_samples=10,
    connections=(1000, 5000),
    flush_turns=1000,
    flush_seconds=5.0,
)


class Stopwatch:
    """A stopwatch of seconds and CPU seconds."""

    def __init__(self, bench: Bench, server: Server) -> None:
        self._bench = bench
        self._server = server
        self._own = psutil.Process(os.getpid())
        self._started = self._read()

    def stop(self) -> tuple[float, float, float, float]:
        """Return the seconds, and the CPU seconds of the server, of Postgres and of this process (the load)."""
        now, server, postgres, own = (end - start for end, start in zip(self._read(), self._started, strict=True))
        return now, server, postgres, own

    def _read(self) -> tuple[float, float, float, float]:
        return (
            time.monotonic(),
            self._server.cpu_seconds(),
            self._bench.postgres_cpu_seconds(),
            sum(self._own.cpu_times()[:2]),
        )


async def turn_cpu(bench: Bench, side: Side, scale: Scale) -> list[Figure]:
    """Measure the server's CPU for a turn of 200 tokens: 100 clients, at 50 tokens/s and as fast as possible."""
    figures = []
    speeds = (
        ("50 tokens/s", TOKENS_PER_SECOND, scale.paced_warm_up_turns, scale.paced_turns, STAGGER_SECONDS),
        ("burst", 0, 1, scale.burst_turns, 0.0),
    )
    for name, speed, warm_up_turns, turns, stagger_seconds in speeds:
        async with bench.serve(side, ECHO_TOKENS=TOKENS, ECHO_TOKENS_PER_SECOND=speed) as server:
            chats = await open_chats(server.port, bench.token, bench.conversations[0][:CLIENTS])
            await ask_all(chats, warm_up_turns, stagger_seconds)
            frames = sum(chat.frames for chat in chats)
            stopwatch = Stopwatch(bench, server)
            await ask_all(chats, turns, stagger_seconds)
            seconds, cpu, postgres_cpu, own_cpu = stopwatch.stop()
            frames = sum(chat.frames for chat in chats) - frames
            close_all(chats)
        count = len(chats) * turns
        figures += [
            Figure(f"{name}: server CPU, ms a turn", 1000 * cpu / count, Target("ratio", 1.5)),
            Figure(f"{name}: Postgres CPU, ms a turn", 1000 * postgres_cpu / count),
            Figure(f"{name}: frames a turn", frames / count),
            Figure(f"{name}: generator CPU, cores", own_cpu / seconds),
        ]
        if not speed:
            figures.append(Figure(f"{name}: tokens a second", count * TOKENS / seconds))
    return figures


async def first_token(bench: Bench, side: Side, scale: Scale) -> list[Figure]:
    """Measure the time from a message to its first token: one client, instant agent, by the length of the history."""
    targets = {0: Target("ratio", 1.5), 1000: Target("ratio", 1.3)}
    figures = []
    settings = {"ECHO_TOKENS": 1, "ECHO_TOKENS_PER_SECOND": 0, "HISTORY_MESSAGES_MAX": 2000}
    async with bench.serve(side, **settings) as server:
        for history in HISTORIES:
            ids = bench.conversations[history][: scale.warm_up_samples + scale.samples]
            chat = Chat(ids[0])
            await chat.open(server.port, bench.token)
            samples = []
            for chat.conversation_id in ids:
                samples.append(1000 * await chat.first_token_seconds())
            chat.close()
            measured = samples[scale.warm_up_samples :]
            figures += [
                Figure(f"history {history}: p50, ms", percentile(measured, 50), targets.get(history)),
                Figure(f"history {history}: p99, ms", percentile(measured, 99)),
            ]
    return figures


async def idle(bench: Bench, side: Side, scale: Scale) -> list[Figure]:
    """Measure the server's memory for each connection that is authenticated and idle."""
    figures = []
    async with bench.serve(side) as server:
        for connection in await connect_many(
            server.port, bench.token, 200
        ):  # so that what is allocated once is there already
            connection.abort()
        await asyncio.sleep(1.0)
        before = server.private_bytes()
        connections: list[Connection] = []
        for count in scale.connections:
            connections += await connect_many(server.port, bench.token, count - len(connections))
            await asyncio.sleep(1.0)
            each = (server.private_bytes() - before) / count / 1024
            figures.append(Figure(f"{count:,} connections: KiB each", each, Target("ratio", 1.3)))
        for connection in connections:
            connection.abort()
    return figures


async def flush(bench: Bench, side: Side, scale: Scale) -> list[Figure]:
    """Measure 1,000 turns at 50 tokens/s in the steady state: statements, delay, CPU, WAL. The floor has no journal."""
    settings = {
        "AGENT": "bench.agents:timed",
        "ECHO_TOKENS": 1_000_000,  # no turn ends while it is watched
        "ECHO_TOKENS_PER_SECOND": TOKENS_PER_SECOND,
        "ANSWER_BYTES_MAX": 67_108_864,
    }
    async with bench.serve(side, **settings) as server:
        chats = await open_chats(server.port, bench.token, bench.conversations[0][: scale.flush_turns])
        asked = []
        for chat in chats:
            asked.append(chat.ask())
            await asyncio.sleep(STAGGER_SECONDS * 2 / len(chats))
        await asyncio.sleep(2.0)
        counted_before = await _counted(server)
        wal_before = await bench.wal_bytes()
        delays = array("q")
        tokens_before = sum(chat.tokens for chat in chats)
        stopwatch = Stopwatch(bench, server)
        for chat in chats:
            chat.delays = delays
        await asyncio.sleep(scale.flush_seconds)
        for chat in chats:
            chat.delays = None
        seconds, cpu, postgres_cpu, own_cpu = stopwatch.stop()
        tokens = sum(chat.tokens for chat in chats) - tokens_before
        wal = await bench.wal_bytes() - wal_before
        counted = [after - before for after, before in zip(await _counted(server), counted_before, strict=True)]
        for answer in asked:
            if answer.done():
                answer.result()  # raises an error; an end would be too early
            answer.cancel()
        close_all(chats)
    ordered = sorted(delays)
    figures = [
        Figure("tokens/s", tokens / seconds),
        Figure("delay p50, ms", percentile(ordered, 50) / 1e6),
        Figure("delay p99, ms", percentile(ordered, 99) / 1e6, Target("product", 60)),
        Figure("server CPU, cores", cpu / seconds),
        Figure("Postgres CPU, cores", postgres_cpu / seconds),
        Figure("generator CPU, cores", own_cpu / seconds),
    ]
    if counted:
        flushes, events = counted
        figures = [
            Figure("flushes/s", flushes / seconds, Target("product", 50)),
            Figure("events/s", events / seconds),
            Figure("WAL bytes a token", wal / tokens),
            *figures,
        ]
    return figures


Measure: TypeAlias = Callable[[Bench, Side, Scale], Awaitable[list[Figure]]]
MEASURES: Final[Mapping[str, Measure]] = {
    "turn_cpu": turn_cpu,
    "first_token": first_token,
    "idle": idle,
    "flush": flush,
}


async def ask_all(chats: Sequence[Chat], turns: int, stagger_seconds: float) -> None:
    """Let every client ask `turns` times; the first questions are spread over some seconds. Raises LoadError."""
    async with asyncio.TaskGroup() as group:
        for number, chat in enumerate(chats):
            after_seconds = stagger_seconds * number / len(chats)
            group.create_task(chat.ask_turns(turns, TOKENS, after_seconds=after_seconds))


async def _counted(server: Server) -> list[float]:
    if server.side == "floor":
        return []
    return [await server.metric("anynode_flushes_total"), await server.metric("anynode_events_total")]


def close_all(chats: Sequence[Chat]) -> None:
    """Drop all connections."""
    for chat in chats:
        chat.close()
