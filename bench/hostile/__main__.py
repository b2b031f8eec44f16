"""`make hostile`: attack a node, print what it cost, and exit with 1 if a bound is broken."""

from __future__ import annotations

import asyncio
import fcntl
import shutil
import signal
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from anynode.server.dev.embedded_postgres import embedded_postgres
from anynode.server.errors import ConfigurationError
from bench.hostile.attacks import ATTACKS, ROWS
from bench.hostile.figures import COLUMNS, Bound, Column, Outcome, fill, replaced, text_table
from bench.hostile.strike import FULL, QUICK, Ground, Scale
from bench.load import LoadError
from bench.progress import Progress
from tests.kit.harness import CODE


def _bounds(context: click.Context, parameter: click.Parameter, values: Sequence[str]) -> list[Bound]:
    bounds = []
    for value in values:
        label, _, most = value.rpartition("=")
        try:
            bounds.append(Bound(label, float(most)))
        except ValueError:
            raise click.BadParameter(f"must be LABEL=NUMBER, such as 'tracebacks=0', not {value!r}") from None
    return bounds


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", nargs=-1, metavar="[ATTACK]…", type=click.Choice(list(ATTACKS)))
@click.option(
    "--quick",
    is_flag=True,
    help="Less of everything, without attacks that take long or resemble others.",
)
@click.option("--list", "is_list", is_flag=True, help="List the attacks and end.")
@click.option(
    "--code",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=CODE,
    show_default="this one",
    help="The checkout whose node is attacked; another one runs with the Python of its .venv.",
)
@click.option(
    "--bound", "given", multiple=True, metavar="LABEL=MOST", callback=_bounds, help="Replace a bound. Repeatable."
)
@click.option(
    "--markdown",
    "document",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Write the figures into the table of this document, docs/security-tests.md.",
)
@click.option("--column", type=click.Choice(COLUMNS), default="after", show_default=True, help="The table's column.")
@click.option(
    "--lock",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Hold the lock (flock) of this file during each attack, where programs that measure share a machine.",
)
def hostile(
    names: Sequence[str],
    quick: bool,
    is_list: bool,
    code: Path,
    given: Sequence[Bound],
    document: Path | None,
    column: Column,
    lock: Path | None,
) -> None:
    """Attack a node on 127.0.0.1 with all attacks, or with those that are named, and compare the cost with bounds."""
    if is_list:
        for name, attack in ATTACKS.items():
            click.echo(f"{name:18} {attack.what}")
        return
    chosen = list(names) or [name for name, attack in ATTACKS.items() if not (quick and attack.is_slow)]
    directory = Path(tempfile.mkdtemp(prefix="anynode-hostile-"))
    try:
        with embedded_postgres(directory / "postgres") as postgres, asyncio.Runner() as runner:
            ground = Ground(postgres.url, directory, code.resolve())
            outcomes, failures = runner.run(_all(ground, chosen, QUICK if quick else FULL, given, lock))
    except (ConfigurationError, LoadError) as error:
        raise click.ClickException(str(error)) from error
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    click.echo(text_table(outcomes))
    if document is not None:
        document.write_text(fill(document.read_text(), ROWS, outcomes, column))
    broken = [outcome.name for outcome in outcomes if outcome.broken]
    click.echo(f"\n{len(outcomes) - len(broken)} of {len(chosen)} attacks stayed within their bounds.")
    if failures:
        raise click.ClickException(f"could not be run: {', '.join(failures)}")
    if broken:
        raise click.ClickException(f"bounds are broken under: {', '.join(broken)}")


async def _all(
    ground: Ground, names: Sequence[str], scale: Scale, given: Sequence[Bound], lock: Path | None
) -> tuple[list[Outcome], list[str]]:
    """Run attacks one after another; return what was measured, and the names of those that could not be run."""
    this = asyncio.current_task()
    assert this is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)  # so that nothing is left running
    await ground.prepare()
    progress = Progress(len(names))
    outcomes, failures = [], []
    for name in names:
        attack = ATTACKS[name]
        progress.step(f"{name}: {attack.what}")
        with _held(lock):
            try:
                outcomes.append(await ground.strike(name, attack, scale, replaced(attack.bounds, given)))
            except (LoadError, OSError, AssertionError) as error:  # a timeout is an OSError too
                failures.append(name)
                click.echo(f"\n{name} could not be run: {error or type(error).__name__}", err=True)
                continue
        if outcomes[-1].broken:
            click.echo(f"\n{name} {outcomes[-1].verdict}", err=True)
    progress.clear()
    return outcomes, failures


@contextmanager
def _held(lock: Path | None) -> Iterator[None]:
    if lock is None:
        yield
        return
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    hostile()
