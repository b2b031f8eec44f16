"""One attack on a node of its own, with a bystander beside it, and all that is measured of the three."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

import psutil

from bench.hostile.attacks import Attack
from bench.hostile.bystander import USER
from bench.hostile.figures import BESIDE, GROWTH, LOG, REFUSED, STATUS, TRACEBACKS, Bound, Delays, Outcome
from bench.hostile.peer import Target
from bench.load import LoadError
from tests.kit.harness import (
    CODE,
    NO_USER_LIMITS,
    SECRET,
    NodeProcess,
    free_port,
    python_of,
    running_node,
    sql,
    token_for,
    with_database,
)

TEMPLATE: Final = "hostile_template"
PREPARING_SECONDS_MAX: Final = 60.0
ATTACK_SECONDS_MAX: Final = 300.0
SAMPLE_SECONDS: Final = 0.05
WARM: Final = 8  # lines of the bystander before anything counts: the first turns of a node are slower
NOTES_MAX: Final = 3
LETTING_GO_SECONDS: Final = 5.0
KILLED: Final = 137.0  # what a shell shows of a process that was killed

# What a user may do is limited as a node does by default; only the bystander's own rate must pass.
DEFAULTS: Final[Mapping[str, str]] = {
    **dict.fromkeys(NO_USER_LIMITS, ""),  # an empty setting counts as unset
    "TURNS_PER_USER_PER_MINUTE": "0",
    "ECHO_TOKENS_PER_SECOND": "50",
}


@dataclass(frozen=True)
class Scale:
    """How long an attack goes on, how long the user is alone before it, and the share of what is counted."""

    seconds: float
    alone_seconds: float
    settling_seconds: float
    counted: float


FULL: Final = Scale(5.0, 2.0, 0.8, 1.0)
QUICK: Final = Scale(1.5, 0.8, 0.3, 0.2)


class Heard(NamedTuple):
    """One line of the bystander."""

    at: float
    kind: str
    ms: float | None
    why: str


Process: TypeAlias = asyncio.subprocess.Process


class Ground:
    """A Postgres with a template database, and the checkout whose nodes are attacked."""

    def __init__(self, postgres_url: str, directory: Path, code: Path) -> None:
        self.alone: list[float] = []  # the bystander's delays before all attacks so far
        self._url = postgres_url
        self._directory = directory
        self._code = code

    async def prepare(self) -> None:
        """Make the template with the checkout's own migrations. Raises LoadError."""
        await sql(self._url, f"CREATE DATABASE {TEMPLATE}")
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(self._code), "JWT_SECRET": SECRET}
        process = await asyncio.create_subprocess_exec(
            python_of(self._code),
            *("-m", "anynode.server.cli", "migrate"),
            env={**environment, "DATABASE_URL": with_database(self._url, TEMPLATE)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        output, _ = await process.communicate()
        if process.returncode:
            raise LoadError(f"the migrations of {self._code} fail: {output.decode()[-500:]}")

    async def strike(self, name: str, attack: Attack, scale: Scale, bounds: Sequence[Bound]) -> Outcome:
        """Run one attack. Raises LoadError for an attack that cannot be prepared."""
        database = f"hostile_{name}"
        await sql(self._url, f"CREATE DATABASE {database} TEMPLATE {TEMPLATE}")
        url = with_database(self._url, database)
        provider_port = free_port()
        model = {"OPENAI_BASE_URL": f"http://127.0.0.1:{provider_port}/v1"}
        environment = {**DEFAULTS, **model, **attack.environment}
        try:
            # The attacker loads its modules while the nodes start.
            async with _process("bench.hostile.attacker", name) as attacker, AsyncExitStack() as stack:
                nodes = [
                    stack.enter_context(running_node(url, self._directory, environment, code=self._code))
                    for _ in range(attack.nodes)
                ]
                target = Target(nodes[0].port, SECRET, url, scale.seconds, scale.counted, provider_port)
                return await self._struck(name, nodes[0], attacker, target, scale, bounds)
        finally:
            await sql(self._url, f"DROP DATABASE {database} WITH (FORCE)")

    async def _struck(
        self,
        name: str,
        node: NodeProcess,
        attacker: Process,
        target: Target,
        scale: Scale,
        bounds: Sequence[Bound],
    ) -> Outcome:
        node_process = psutil.Process(node.process.pid)
        heard: list[Heard] = []
        warm = asyncio.Event()
        async with _process("bench.hostile.bystander", str(node.port), token_for(USER)) as bystander:
            listening = asyncio.create_task(_listen(bystander, heard, warm))
            async with asyncio.timeout(PREPARING_SECONDS_MAX):
                if await _told(attacker, target.encoded()) != "prepared":
                    raise LoadError("it cannot be prepared")
                await warm.wait()
            calm = time.monotonic()
            await asyncio.sleep(scale.alone_seconds)
            log_bytes = node.log.stat().st_size
            samples = [_megabytes(node_process)]
            sampling = asyncio.create_task(_sample(node_process, samples))
            began = time.monotonic()
            async with asyncio.timeout(ATTACK_SECONDS_MAX):
                said = await _told(attacker, "go")
            # What a short attack has done may show later.
            await asyncio.sleep(max(scale.settling_seconds, began + scale.seconds / 2 - time.monotonic()))
            ended = time.monotonic()
            bystander.stdin.close()  # type: ignore[union-attr]
            await listening
            sampling.cancel()
            memory = (samples[0], max(samples), _megabytes(node_process))
        status = await asyncio.to_thread(_stop, node)
        if not said:
            raise LoadError("the attack itself failed; what it wrote is above")
        log = node.log.read_bytes()
        tokens = [(one.at, one.ms) for one in heard if one.kind == "token" and one.ms is not None]
        # A question that an attack overtakes counts as one under attack.
        alone = [ms for at, ms in tokens if calm <= at and at + ms / 1000 < began]
        attacked = Delays.of([ms for at, ms in tokens if at + ms / 1000 >= began and at < ended])
        refusals = [f"{one.kind}: {one.why}" for one in heard if one.why and one.at >= began]
        self.alone += alone
        figures = {
            BESIDE: attacked.p99 - Delays.of(self.alone).p99,
            REFUSED: len(refusals),
            GROWTH: memory[1] - memory[0],
            TRACEBACKS: log.count(b"Traceback (most recent call last)"),
            LOG: (len(log) - log_bytes) / 1000,
            STATUS: status,
            **json.loads(said),
        }
        notes = [f"refused {reason}" for reason in list(dict.fromkeys(refusals))[:NOTES_MAX]]
        return Outcome(name, Delays.of(alone), attacked, memory, figures, bounds, notes)


async def _told(attacker: Process, order: str) -> str:
    """Give the attacker an order, and return the line that it answers with; an empty one if it has ended."""
    assert attacker.stdin is not None
    assert attacker.stdout is not None
    attacker.stdin.write(order.encode() + b"\n")
    return (await attacker.stdout.readline()).decode().strip()


@asynccontextmanager
async def _process(module: str, *arguments: str) -> AsyncIterator[Process]:
    """Run a module as a process with pipes; end it at the end, gently first."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, *arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=CODE
    )
    try:
        yield process
    finally:
        if process.stdin is not None:
            process.stdin.close()
        try:
            async with asyncio.timeout(LETTING_GO_SECONDS):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


async def _listen(bystander: Process, heard: list[Heard], warm: asyncio.Event) -> None:
    assert bystander.stdout is not None
    async for line in bystander.stdout:
        said = json.loads(line)
        heard.append(Heard(said["at"], said["kind"], said.get("ms"), said.get("why", "")))
        if len(heard) >= WARM:
            warm.set()


async def _sample(process: psutil.Process, samples: list[float]) -> None:
    while True:
        samples.append(_megabytes(process))
        await asyncio.sleep(SAMPLE_SECONDS)


def _megabytes(process: psutil.Process) -> float:
    try:
        return float(process.memory_info().rss) / 1e6
    except psutil.Error:
        return float("inf")  # the node is gone


def _stop(node: NodeProcess) -> float:
    try:
        return abs(node.stop())
    except subprocess.TimeoutExpired:
        return KILLED
