"""`python -m bench.stock`: how many answers the AI SDK's own packages show whole after faults."""

from __future__ import annotations

import asyncio
import random
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import asyncpg
import click

from anynode.server.dev.embedded_postgres import embedded_postgres
from bench.load import LoadError
from bench.progress import Progress
from bench.servers import USER, Bench, Server
from tests.agents.stock import AGENT
from tests.kit.npm import RegistryUnreachable, Script, ScriptError, install
from tests.kit.stock.balancer import Balancer, running_balancer
from tests.kit.stock.tabs import SOURCES, Tab, View, open_tab, running_driver
from tests.kit.stock.world import CLIENTS, asked

TOKENS: Final = 200
TOKENS_PER_SECOND: Final = 100
WHOLE: Final = "".join(f"w{number} " for number in range(TOKENS))
# The agent of the drops and of every other kill goes on in mid-sentence; that of the others begins its step again, so
# that text is taken back.
CONTINUING: Final = {"ECHO_TOKENS": TOKENS, "ECHO_TOKENS_PER_SECOND": TOKENS_PER_SECOND}
RESTARTING: Final = {"AGENT": AGENT}
QUESTION: Final = asked(["paced", TOKENS, "w{number} ", 1 / TOKENS_PER_SECOND])
DROPS_AT_ONCE: Final = 8
DROPS_OF_A_TURN_MAX: Final = 3
TURN_SECONDS_MAX: Final = 60.0
CHARACTERS_BEFORE_KILL: Final = 20  # characters that all tabs have shown when the node is killed, at the least


@dataclass(frozen=True)
class Outcome:
    """The end of one turn, as one client saw it."""

    client: str
    is_whole: bool
    is_doubled: bool
    errors: Sequence[str]  # of the protocol: those that are not a lost connection
    connections: int


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def stock() -> None:
    """Count the answers that are complete after faults, as the AI SDK's own packages show them."""


@stock.command()
@click.option("--count", default=50, show_default=True, type=click.IntRange(1), help="Turns of each client.")
@click.option("--face", type=click.Choice(["ws", "http"]), help="Only the clients that talk over this.")
def drops(count: int, face: str | None) -> None:
    """Break connections at random bytes, up to three times a turn; the next connection goes to the other node."""
    clients = [name for name, options in CLIENTS.items() if face in (None, options["face"])]
    _run(lambda bench, script: _drops(bench, script, clients, count))


@stock.command()
@click.option("--count", default=20, show_default=True, type=click.IntRange(1), help="Nodes that are killed.")
def kills(count: int) -> None:
    """Send SIGKILL to a node at a random moment of a turn of each client; the next connection goes to another node."""
    _run(lambda bench, script: _kills(bench, script, count))


def _run(measure: Callable[[Bench, Script], Awaitable[list[Outcome]]]) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no process outlives this one
    directory = Path(tempfile.mkdtemp(prefix="anynode-bench-"))
    try:
        install(SOURCES)
        with embedded_postgres(directory / "postgres") as postgres, running_driver() as script:
            outcomes = asyncio.run(_measured(Bench(postgres, directory), script, measure))
    except (RegistryUnreachable, LoadError, ScriptError) as error:
        raise click.ClickException(str(error)) from error
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    click.echo(table(outcomes))
    for said in sorted({said for outcome in outcomes for said in outcome.errors}):
        click.echo(f"  {said}")
    if not all(outcome.is_whole and not outcome.is_doubled and not outcome.errors for outcome in outcomes):
        raise click.ClickException("not all of them are right")


async def _measured(
    bench: Bench, script: Script, measure: Callable[[Bench, Script], Awaitable[list[Outcome]]]
) -> list[Outcome]:
    await bench.prepare({}, ("product",))
    return await measure(bench, script)


def table(outcomes: Sequence[Outcome]) -> str:
    """Format a line for each client."""
    rows: list[tuple[str, ...]] = [("client", "turns", "whole", "doubled", "protocol errors", "reconnects")]
    for client in dict.fromkeys(outcome.client for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.client == client]
        counts = (
            len(own),
            sum(outcome.is_whole for outcome in own),
            sum(outcome.is_doubled for outcome in own),
            sum(len(outcome.errors) for outcome in own),
            sum(outcome.connections - 1 for outcome in own),
        )
        rows.append((client, *map(str, counts)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


async def _drops(bench: Bench, script: Script, clients: Sequence[str], count: int) -> list[Outcome]:
    progress = Progress(len(clients) * count)
    outcomes: list[Outcome] = []
    limit = asyncio.Semaphore(DROPS_AT_ONCE)
    async with bench.serve_nodes(2, **CONTINUING) as nodes:

        async def drop(client: str, bytes_sent: int) -> None:
            async with limit, _balanced_tab(bench, script, nodes, CLIENTS[client]) as (tab, balancer):
                for _ in range(random.randint(1, DROPS_OF_A_TURN_MAX)):
                    balancer.cut(random.randrange(bytes_sent), random.choice(("rst", "fin")))
                outcomes.append(await _outcome(client, tab, await _answered(tab), nodes[0].database_url))
                progress.step(f"{client}: {'whole' if outcomes[-1].is_whole else 'BROKEN'}")

        for client in clients:
            async with _balanced_tab(bench, script, nodes, CLIENTS[client]) as (tab, balancer):
                view = await _answered(tab)
                if view.text != WHOLE:
                    raise LoadError(f"{client} does not even answer undisturbed: {view}")
                bytes_sent = balancer.bytes_sent
            async with asyncio.TaskGroup() as group:
                for _ in range(count):
                    group.create_task(drop(client, bytes_sent))
        await _assert_handled(script)
    progress.clear()
    return outcomes


async def _kills(bench: Bench, script: Script, count: int) -> list[Outcome]:
    progress = Progress(count)
    outcomes: list[Outcome] = []
    for number in range(count):
        agent = RESTARTING if number % 2 else CONTINUING
        async with bench.serve_nodes(2, LEASE_SECONDS=1, **agent) as nodes, AsyncExitStack() as stack:
            tabs: dict[str, Tab] = {}
            for client, options in CLIENTS.items():
                opened = _balanced_tab(bench, script, nodes, options)
                tabs[client], _ = await stack.enter_async_context(opened)
            for tab in tabs.values():
                await tab.send(QUESTION)
            for tab in tabs.values():
                await tab.until(characters=CHARACTERS_BEFORE_KILL)
            await asyncio.sleep(random.uniform(0, 0.9 * TOKENS / TOKENS_PER_SECOND))
            nodes[0].kill()
            for client, tab in tabs.items():
                outcomes.append(await _outcome(client, tab, await tab.settled(), nodes[0].database_url))
            killed = outcomes[-len(tabs) :]
            progress.step(f"killed: {sum(outcome.is_whole for outcome in killed)} of {len(killed)} whole")
            await _assert_handled(script)
    progress.clear()
    return outcomes


@asynccontextmanager
async def _balanced_tab(
    bench: Bench, script: Script, nodes: Sequence[Server], options: Mapping[str, Any]
) -> AsyncIterator[tuple[Tab, Balancer]]:
    async with (
        running_balancer(*(node.port for node in nodes)) as balancer,
        open_tab(script, balancer.http, bench.token, **options) as tab,
    ):
        yield tab, balancer


async def _answered(tab: Tab) -> View:
    async with asyncio.timeout(TURN_SECONDS_MAX):
        return await tab.ask(QUESTION)


async def _outcome(client: str, tab: Tab, view: View, database_url: str) -> Outcome:
    connection = await asyncpg.connect(database_url)
    try:
        rows = await connection.fetch(
            """SELECT m.role, m.content FROM messages m JOIN conversations c ON c.id = m.conversation_id
               WHERE c.user_id = $1 AND c.client_id = $2 ORDER BY m.position""",
            *(USER, tab.chat_id),
        )
    finally:
        await connection.close()
    stored = [row["role"] for row in rows]
    is_whole = view.status == "ready" and view.text == WHOLE and rows[-1]["content"] == WHOLE
    is_doubled = len(view.messages) > 2 or len(stored) > 2
    return Outcome(client, is_whole, is_doubled, view.complaints, view.wire["connections"])


async def _assert_handled(script: Script) -> None:
    if left := await script.call("unhandled"):
        raise LoadError(f"the packages leave rejections unhandled: {left}")


if __name__ == "__main__":
    stock()
