"""`anynode bench`: the product and the floor in turn, and the ratio; or the product alone, under faults."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import resource
import shutil
import signal
import tempfile
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import click
import uvloop

from anynode.server.dev.embedded_postgres import embedded_postgres
from anynode.server.errors import ConfigurationError
from bench.faces import DEFAULT as DEFAULT_FACES
from bench.faces import FACES
from bench.faces import QUICK as QUICK_FACES
from bench.faults import CONVERSATIONS, FAULTS
from bench.faults import DEFAULT as DEFAULT_FAULTS
from bench.faults import QUICK as QUICK_FAULTS
from bench.load import LoadError
from bench.measures import DEFAULT, MEASURES, QUICK, Scale
from bench.progress import Progress
from bench.report import Figure, lines, table
from bench.servers import SIDES, Bench, Side

REASON_SHOWN_MAX: Final = 500  # characters of the reason why a measurement failed
LOG_SHOWN_MAX: Final = 2000  # characters of its server's log, from the beginning


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", nargs=-1, metavar="[NAME]…", type=click.Choice(list(MEASURES)))
@click.option(
    "--fault",
    "faults",
    multiple=True,
    metavar="NAME",
    type=click.Choice([*FAULTS, "all"]),
    help=f"Measure the product alone instead, several nodes under faults: {', '.join(FAULTS)}, or all. Repeatable.",
)
@click.option(
    "--face",
    "faces",
    multiple=True,
    metavar="NAME",
    type=click.Choice([*FACES, "all"]),
    help=f"Measure what other faces cost, the product alone: {', '.join(FACES)}, or all. Repeatable.",
)
@click.option(
    "--rounds",
    type=click.IntRange(1, 100),
    help=f"Rounds of each measure.  [default: {DEFAULT.rounds}, faults {DEFAULT_FAULTS.rounds}; with --quick 1]",
)
@click.option("--quick", is_flag=True, help="Less of everything: does it work, and roughly how well?")
def bench(names: Sequence[str], faults: Sequence[str], faces: Sequence[str], rounds: int | None, quick: bool) -> None:
    """Measure this product and the floor in turn: turn_cpu, first_token, idle, flush; all of them by default."""
    if sum(map(bool, (names, faults, faces))) > 1:
        raise click.UsageError("either NAME or --fault or --face")
    _raise_file_limit()
    directory = Path(tempfile.mkdtemp(prefix="anynode-bench-"))
    try:
        # No settings: fsync and all else are Postgres' own defaults.
        with (
            embedded_postgres(directory / "postgres") as postgres,
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            bench = Bench(postgres, directory)
            if faults:
                fault_scale = QUICK_FAULTS if quick else DEFAULT_FAULTS
                struck = {name: partial(FAULTS[name], bench, fault_scale) for name in _chosen(FAULTS, faults)}
                failures = runner.run(_alone(bench, struck, rounds or fault_scale.rounds))
            elif faces:
                face_scale = QUICK_FACES if quick else DEFAULT_FACES
                asked = {name: partial(FACES[name], bench, face_scale) for name in _chosen(FACES, faces)}
                failures = runner.run(_alone(bench, asked, rounds or face_scale.rounds))
            else:
                scale = QUICK if quick else DEFAULT
                scale = dataclasses.replace(scale, rounds=rounds or scale.rounds)
                failures = runner.run(_compared(bench, list(names) or list(MEASURES), scale))
    except ConfigurationError as error:
        raise click.ClickException(str(error)) from error
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    if failures:
        raise click.ClickException(f"{failures} of the measurements failed and are not in the table")


async def _compared(bench: Bench, names: Sequence[str], scale: Scale) -> int:
    """Measure product and floor, print the table, and return how many measurements failed."""
    _end_at_sigterm()
    progress = Progress(1 + scale.rounds * len(names) * len(SIDES))
    progress.step("seeding")
    await bench.prepare(scale.conversations)
    found: dict[tuple[str, Side], list[list[Figure]]] = {(name, side): [] for name in names for side in SIDES}
    failures = 0
    for number in range(scale.rounds):
        for name in names:
            both = {}
            for side in SIDES if number % 2 == 0 else reversed(SIDES):
                progress.step(f"round {number + 1}: {name}, {side}")
                both[side] = await _measure(bench, f"{name} of the {side}", MEASURES[name](bench, side, scale))
            if None in both.values():  # a ratio needs both sides in the same round
                failures += 1
                continue
            for side, figures in both.items():
                found[name, side].append(figures or [])
    progress.clear()
    click.echo(table({name: lines(found[name, "product"], found[name, "floor"]) for name in names}))
    return failures


def _chosen(known: Iterable[str], names: Sequence[str]) -> Iterable[str]:
    return known if "all" in names else names


async def _alone(bench: Bench, measures: Mapping[str, Callable[[], Awaitable[list[Figure]]]], rounds: int) -> int:
    """Measure the product alone, print the table, and return how many measurements failed."""
    _end_at_sigterm()
    progress = Progress(1 + rounds * len(measures))
    progress.step("seeding")
    await bench.prepare(CONVERSATIONS, ("product",))
    found: dict[str, list[list[Figure]]] = {name: [] for name in measures}
    failures = 0
    for number in range(rounds):
        for name, measure in measures.items():
            progress.step(f"round {number + 1}: {name}")
            figures = await _measure(bench, name, measure())
            if figures is None:
                failures += 1
            else:
                found[name].append(figures)
    progress.clear()
    click.echo(table({name: lines(found[name], []) for name in measures}, has_floor=False))
    return failures


async def _measure(bench: Bench, name: str, measuring: Awaitable[list[Figure]]) -> list[Figure] | None:
    gc.collect()
    figures = None
    try:
        figures = await measuring
    except* (LoadError, OSError) as errors:  # a timeout is an OSError too
        error = _first(errors)
        reason = str(error)[:REASON_SHOWN_MAX] or type(error).__name__
        click.echo(f"\n{name} failed: {reason}\n{bench.log()[:LOG_SHOWN_MAX]}", err=True)
    return figures


def _end_at_sigterm() -> None:
    # A server must not outlive the benchmark: SIGTERM unwinds it as Ctrl-C does.
    this = asyncio.current_task()
    assert this is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _raise_file_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    bench()
