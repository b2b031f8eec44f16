"""The product alone, across nodes: turns run on one; clients of another one learn of them, follow, resume, cancel."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final
from uuid import UUID

from bench.clients import Ear, is_ending, is_from, is_type
from bench.load import LoadError
from bench.report import Figure, Target, percentile
from bench.seen import behind, token_numbers
from bench.servers import Bench

STREAMS: Final = 100
RESUMING: Final = 20  # clients that come and go at once
TOKENS_PER_SECOND: Final = 50
SETTLING_SECONDS: Final = 1.5
BETWEEN_SECONDS: Final = (0.1, 0.5)  # from one sample to the next: no rhythm that a node's beat could fall in with
ASKING_SECONDS: Final = (0.0, 0.03)  # from one stream's beginning to the next
AWAY_SECONDS: Final = (0.1, 0.4)  # long enough to miss something
STAYING_SECONDS: Final = (0.0, 0.2)
WAITING_SECONDS_MAX: Final = 15.0
ENDLESS: Final = "think 0 say 1000000"
SHORT: Final = "think 0 say 5"
THINKING: Final = "think 600 say 1"


async def resume(bench: Bench, *, resumes: int, samples: int, lag_seconds: float) -> list[Figure]:
    """Measure two nodes: all turns run on the first one, and the clients of the second are timed."""
    settings = {
        "AGENT": "bench.agents:asked",
        "AGENT_TIMEOUT_SECONDS": 600,
        "ANSWER_BYTES_MAX": 67_108_864,
        "ECHO_TOKENS_PER_SECOND": TOKENS_PER_SECOND,
    }
    ids = iter(bench.conversations[0])

    def take(count: int) -> list[UUID]:
        return [next(ids) for _ in range(count)]

    async with bench.serve_nodes(2, **settings) as (here, there):
        local, remote = Ear(), Ear()
        try:
            await local.open(here.port, bench.token)
            await remote.open(there.port, bench.token)
            # First the measures that need quiet, because streams keep both nodes awake.
            learned = await _learn(local, remote, take(samples))
            early = await _cancel(local, remote, take(samples), THINKING)
            late = await _cancel(local, remote, take(samples), ENDLESS)
            streams = take(STREAMS)
            lags = await _follow(local, remote, streams, lag_seconds)
            resumed = await _resume(local, streams[:RESUMING], there.port, bench.token, resumes)
        finally:
            local.close()
            remote.close()
    return [
        *_figures("connecting to the first missed event", resumed, 99, 250),
        *_figures("remote follower behind a local one", lags, 95, 100),
        Figure("remote follower behind a local one: max, ms", 1000 * max(lags)),
        *_figures("an idle remote follower learns of a turn", learned, 100, 1000),
        *_figures("cancel before the first token", early, 100, 500),
        *_figures("cancel in mid-stream", late, 100, 500),
    ]


def _figures(label: str, seconds: Sequence[float], percent: int, most_ms: float) -> list[Figure]:
    name = "max" if percent == 100 else f"p{percent}"
    return [
        Figure(f"{label}: p50, ms", 1000 * percentile(seconds, 50)),
        Figure(f"{label}: {name}, ms", 1000 * percentile(seconds, percent), Target("worst", most_ms)),
    ]


async def _learn(local: Ear, remote: Ear, conversation_ids: Sequence[UUID]) -> list[float]:
    """Measure the time from sending a message here until an idle follower there has its turn."""
    for one in conversation_ids:
        remote.follow(one, 0)
    await asyncio.sleep(SETTLING_SECONDS)

    async def sample(conversation_id: UUID) -> float:
        asked_at = time.monotonic()
        local.ask(conversation_id, SHORT)
        started = await remote.first(conversation_id, is_type("turn.started"), WAITING_SECONDS_MAX)
        return started.at - asked_at

    return await _sample_each(sample, conversation_ids)


async def _cancel(local: Ear, remote: Ear, conversation_ids: Sequence[UUID], question: str) -> list[float]:
    """Measure the time from cancelling a turn there until its end arrives there."""
    begins = is_type("turn.started" if question == THINKING else "turn.delta")

    async def sample(conversation_id: UUID) -> float:
        remote.follow(conversation_id, 0)
        local.ask(conversation_id, question)
        await remote.first(conversation_id, begins, WAITING_SECONDS_MAX)
        await asyncio.sleep(random.uniform(*BETWEEN_SECONDS))
        asked_at = time.monotonic()
        remote.cancel(conversation_id)
        ending = await remote.first(conversation_id, is_ending, WAITING_SECONDS_MAX)
        if ending.frame["type"] != "turn.cancelled":
            raise LoadError(f"a cancelled turn ends as {ending.frame['type']}")
        return ending.at - asked_at

    return await _sample_each(sample, conversation_ids)


async def _sample_each(sample: Callable[[UUID], Awaitable[float]], conversation_ids: Sequence[UUID]) -> list[float]:
    """Begin a sample after the other, without waiting for its end."""
    async with asyncio.TaskGroup() as group:
        tasks = []
        for one in conversation_ids:
            tasks.append(group.create_task(_run(sample, one)))
            await asyncio.sleep(random.uniform(*BETWEEN_SECONDS))
    return [task.result() for task in tasks]


async def _run(sample: Callable[[UUID], Awaitable[float]], conversation_id: UUID) -> float:
    return await sample(conversation_id)


async def _follow(local: Ear, remote: Ear, conversation_ids: Sequence[UUID], seconds: float) -> list[float]:
    """Measure how much later each event comes there than here, in the steady state."""
    for one in conversation_ids:
        local.ask(one, ENDLESS)
        remote.follow(one, 0)
        await asyncio.sleep(random.uniform(*ASKING_SECONDS))
    for one in conversation_ids:
        await remote.first(one, is_type("turn.delta"), WAITING_SECONDS_MAX)
    await asyncio.sleep(SETTLING_SECONDS)
    before = {one: local.last_seq(one) for one in conversation_ids}
    await asyncio.sleep(seconds)
    lags = []
    for one in conversation_ids:
        last_seq = local.last_seq(one)
        await remote.first(one, is_from(last_seq), WAITING_SECONDS_MAX)
        came = [(heard.frame["seq"], heard.at) for heard in local.heard[one]]
        came_there = [(heard.frame["seq"], heard.at) for heard in remote.heard[one]]
        lags += behind([(seq, at) for seq, at in came if before[one] < seq <= last_seq], came_there)
    return lags


async def _resume(local: Ear, conversation_ids: Sequence[UUID], port: int, token: str, count: int) -> list[float]:
    """Measure the time from connecting there to the first missed event. No event may be missing or come twice."""

    async def come_and_go(conversation_id: UUID) -> list[float]:
        seconds = []
        cursor, number = local.last_seq(conversation_id), token_numbers(local.frames(conversation_id))[-1]
        for _ in range(count // len(conversation_ids)):
            await asyncio.sleep(random.uniform(*AWAY_SECONDS))
            ear = Ear()
            started_at = time.monotonic()
            await ear.open(port, token)
            ear.follow(conversation_id, cursor)
            missed = await ear.first(conversation_id, is_type("turn.delta"), WAITING_SECONDS_MAX)
            seconds.append(missed.at - started_at)
            await asyncio.sleep(random.uniform(*STAYING_SECONDS))
            ear.close()
            numbers = token_numbers(ear.frames(conversation_id))
            if numbers != list(range(number + 1, number + 1 + len(numbers))):
                raise LoadError(f"after token {number} come {numbers[:10]} …")
            cursor, number = ear.last_seq(conversation_id), numbers[-1]
        return seconds

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(come_and_go(one)) for one in conversation_ids]
    return [second for task in tasks for second in task.result()]
