"""`python -m bench.orm`: what a history costs by the statement that the product uses, and through Tortoise ORM.

Every way reads the same messages of the same conversations on the embedded Postgres, and the ways alternate within a
round. A figure is the CPU time for one history of this process, which decodes it, and of Postgres, which reads it.
"""

from __future__ import annotations

import asyncio
import gc
import shutil
import signal
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, TypeAlias
from uuid import UUID

import asyncpg
import click
import uvloop
from tortoise import Tortoise
from tortoise.queryset import QuerySet

from anynode.models.admissions import read_history
from anynode.models.database import Database
from anynode.models.migrate import tortoise_config
from anynode.models.tables import Message
from anynode.server.dev.embedded_postgres import EmbeddedPostgres, embedded_postgres
from bench.load import LoadError
from bench.progress import Progress
from bench.report import Spread
from bench.servers import Bench

CONVERSATIONS: Final = 20
WARM_UP_READS: Final = 20
COLUMNS: Final = ("id", "role", "content", "status", "turn_id", "tool_calls", "tool_name", "tool_call_id")
ROWS: Final = f"""
    SELECT {", ".join(COLUMNS[1:])} FROM messages WHERE conversation_id = $1 AND status <> 'superseded'
    ORDER BY position DESC LIMIT $2
"""

Said: TypeAlias = list[tuple[str, str]]
Read: TypeAlias = Callable[[UUID], Awaitable[Sequence[object]]]


class Ways:
    """The ways to read the newest `messages` of a conversation. The first is the product's."""

    def __init__(self, database: Database, connection: asyncpg.Connection, messages: int) -> None:
        self._database = database
        self._connection = connection
        self._messages = messages
        self.all: Mapping[str, Read] = {
            "the statement `history`, as the product reads it": self._statement,
            "asyncpg, a row for each message": self._rows,
            "Tortoise, .values() of the columns that are needed": self._values,
            "Tortoise, models with these columns only": self._partial_models,
            "Tortoise, models": self._models,
        }

    async def _statement(self, id: UUID) -> Sequence[object]:
        found = await read_history(self._database, id, messages_max=self._messages)
        return [] if found is None else found[1]

    async def _rows(self, id: UUID) -> Sequence[object]:
        rows: list[asyncpg.Record] = await self._connection.fetch(ROWS, id, self._messages)
        rows.reverse()
        return rows

    async def _values(self, id: UUID) -> Sequence[object]:
        rows = await self._query(id).values(*COLUMNS[1:])
        rows.reverse()
        return rows

    async def _partial_models(self, id: UUID) -> Sequence[object]:
        messages = await self._query(id).only(*COLUMNS)
        messages.reverse()
        return messages

    async def _models(self, id: UUID) -> Sequence[object]:
        messages = await self._query(id)
        messages.reverse()
        return messages

    def _query(self, id: UUID) -> QuerySet[Message]:
        found = Message.filter(conversation_id=id).exclude(status="superseded")
        return found.order_by("-position").limit(self._messages)


def said(messages: Sequence[object]) -> Said:
    """Return role and content of each message, whichever way it was read."""
    return [
        (one["role"], one["content"]) if isinstance(one, Mapping | asyncpg.Record) else (one.role, one.content)  # type: ignore[attr-defined]
        for one in messages
    ]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--messages", default=1000, show_default=True, type=click.IntRange(1, 10_000), help="Of each history.")
@click.option("--reads", default=100, show_default=True, type=click.IntRange(1), help="Of each way in a round.")
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(1, 100))
def orm(messages: int, reads: int, rounds: int) -> None:
    """Measure the CPU of reading a history, by the product's statement and through Tortoise ORM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no process outlives this one
    directory = Path(tempfile.mkdtemp(prefix="anynode-bench-"))
    try:
        with (
            embedded_postgres(directory / "postgres") as postgres,
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            click.echo(runner.run(_measured(postgres, directory, messages, reads, rounds)))
    except LoadError as error:
        raise click.ClickException(str(error)) from None
    finally:
        shutil.rmtree(directory, ignore_errors=True)


async def _measured(postgres: EmbeddedPostgres, directory: Path, messages: int, reads: int, rounds: int) -> str:
    progress = Progress(1 + rounds)
    progress.step("seeding")
    bench = Bench(postgres, directory)
    await bench.prepare({messages: CONVERSATIONS}, ("product",))
    ids = bench.conversations[messages]
    async with _open(bench.template_url("product"), messages) as ways:
        await _check(ways, ids, messages)
        figures: dict[str, list[tuple[float, float]]] = {name: [] for name in ways.all}
        for number in range(rounds):
            progress.step(f"round {number + 1}")
            names = list(ways.all)
            first = number % len(names)
            for name in names[first:] + names[:first]:  # each way comes first in its turn
                figures[name].append(await _cpu_ms(bench, ways.all[name], ids, reads))
    progress.clear()
    return f"CPU for a history of {messages:,} messages, ms: median of {rounds} rounds (range)\n{table(figures)}"


@asynccontextmanager
async def _open(url: str, messages: int):  # type: ignore[no-untyped-def]
    database = await Database.connect(url, pool_max=1)
    connection = await asyncpg.connect(url)
    await Tortoise.init(config=tortoise_config(url))
    try:
        yield Ways(database, connection, messages)
    finally:
        await Tortoise.close_connections()
        await connection.close()
        await database.close()


async def _check(ways: Ways, ids: Sequence[UUID], messages: int) -> None:
    """Read every conversation each way. Raises LoadError where the ways read different messages."""
    for id in ids:
        histories = [said(await read(id)) for read in ways.all.values()]
        if len(histories[0]) != messages or any(history != histories[0] for history in histories):
            raise LoadError("the ways do not read the same messages")


async def _cpu_ms(bench: Bench, read: Read, ids: Sequence[UUID], reads: int) -> tuple[float, float]:
    """Return the CPU of this process and that of Postgres for one history."""
    gc.collect()
    for number in range(WARM_UP_READS):
        await read(ids[number % len(ids)])
    own, postgres = time.process_time(), bench.postgres_cpu_seconds()
    for number in range(reads):
        await read(ids[number % len(ids)])
    own, postgres = time.process_time() - own, bench.postgres_cpu_seconds() - postgres
    return 1000 * own / reads, 1000 * postgres / reads


def table(figures: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Format the figures of every way, with the ratio of this process' CPU to that of the first way in each round."""
    first = next(iter(figures.values()))
    rows = [("", "this process", "/ the first", "Postgres", "both / the first")]
    for name, rounds in figures.items():
        pairs = list(zip(rounds, first, strict=True))
        rows.append(
            (
                name,
                str(Spread.of([own for own, _ in rounds])),
                str(Spread.of([mine[0] / its[0] for mine, its in pairs])),
                str(Spread.of([postgres for _, postgres in rounds])),
                str(Spread.of([sum(mine) / sum(its) for mine, its in pairs])),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


if __name__ == "__main__":
    orm()
