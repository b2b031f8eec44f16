"""`anynode dev`: everything on one machine, and a terminal that says where to go."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path
from textwrap import indent
from types import FrameType
from typing import Final

import click

from anynode.models.migrate import migrate
from anynode.server.agents.load import check_agent, check_tools
from anynode.server.api.operations import AI_SDK_PATH
from anynode.server.api.page import missing
from anynode.server.auth import make_token
from anynode.server.dev.embedded_postgres import embedded_postgres
from anynode.server.dev.load_balancer import LoadBalancer
from anynode.server.dev.nodes import DevNode, DevNodes, reachable
from anynode.server.errors import ConfigurationError
from anynode.server.settings import Settings, read_settings
from anynode.server.startup import on_database

DEV_USER: Final = "dev"
TOKEN_SECONDS: Final = 7 * 86_400
# Less than for production: a developer who has killed a node waits to see the answer go on, and a usual limit of open
# files is too low for thousands of connections.
LESS: Final = {"DRAIN_SECONDS": "1", "LEASE_SECONDS": "2", "CONNECTIONS_MAX": "1000"}
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Pages of other people's development servers that may connect.
DEV_ORIGINS: Final = ",".join(f"http://{host}:{port}" for host in ("localhost", "127.0.0.1") for port in (3000, 5173))


def dev_secret(data_directory: Path) -> str:
    """Return the secret that `anynode dev` signs its tokens with. It is made once, and kept beside the database."""
    path = data_directory / "jwt_secret"
    try:
        return path.read_text()
    except FileNotFoundError:
        pass
    data_directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = data_directory / f"jwt_secret.{os.getpid()}"
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_urlsafe(48))
    try:
        os.link(fresh, path)  # fails where another process was first: its secret is kept
    except FileExistsError:
        pass
    finally:
        fresh.unlink()
    return path.read_text()


def run_dev(environment: Mapping[str, str], *, nodes: int, data_directory: Path) -> None:
    """Run everything until a signal. Raises ConfigurationError."""
    settings = read_settings(environment)
    check_agent(settings.agent)
    check_tools(settings.tools)
    # SIGINT too: a shell that starts us in the background has it ignored.
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    try:
        with _database(settings, data_directory) as database_url:
            applied = on_database(database_url, migrate)
            if applied:
                click.secho(f"  migrated: {', '.join(applied)}", dim=True)
            host = environment.get("HOST") or "127.0.0.1"
            needed = nodes + 1 if nodes > 1 else 1
            ports = _free_ports(host, settings.port, needed, is_fixed="PORT" in environment)
            secret = settings.jwt_secret or dev_secret(data_directory)
            shared = {
                "ALLOWED_ORIGINS": DEV_ORIGINS,
                **environment,
                **{name: environment.get(name) or value for name, value in LESS.items()},
                "HOST": host,
                "DATABASE_URL": database_url,
                **({} if settings.jwt_jwks_url else {"JWT_SECRET": secret}),
            }
            asyncio.run(_run(settings, shared, host, ports[:nodes], ports[nodes:], secret))
    except (KeyboardInterrupt, asyncio.CancelledError):
        click.secho("\n  stopped", dim=True)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


async def _run(
    settings: Settings,
    environment: Mapping[str, str],
    host: str,
    node_ports: Sequence[int],
    balancer_ports: Sequence[int],
    secret: str,
) -> None:
    """Run the nodes, and a load balancer where it has a port, until a signal cancels it. Raises ConfigurationError."""
    load_balancer = LoadBalancer()
    drain_seconds = float(environment["DRAIN_SECONDS"])
    nodes = DevNodes(environment, host, node_ports, load_balancer, drain_seconds=drain_seconds)
    with _cancelled_by_signals():
        async with AsyncExitStack() as stack:
            for port in balancer_ports:  # outside: the nodes' last words pass it
                try:
                    await stack.enter_async_context(load_balancer.listening(host, port))
                except OSError as error:
                    raise ConfigurationError(f"port {port} is taken: set PORT to another one") from error
            await stack.enter_async_context(nodes.running())
            await nodes.wait_ready()
            _say_where_to_go(settings, host, nodes.nodes, balancer_ports, secret)
            await nodes.supervise()
            raise ConfigurationError("all nodes have ended")


@contextmanager
def _cancelled_by_signals() -> Iterator[None]:
    """Cancel the current task at each signal: the second one cuts short what the first one has begun."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def cancel(signum: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(task.cancel)

    for number in SIGNALS:
        signal.signal(number, cancel)
    try:
        yield
    finally:
        for number in SIGNALS:
            signal.signal(number, _interrupt)


@contextmanager
def _database(settings: Settings, data_directory: Path) -> Iterator[str]:
    if settings.database_url is not None:
        yield settings.database_url
        return
    if not (data_directory / "postgres").exists():
        click.secho(f"  creating a database in {data_directory} …", dim=True)
    data_directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with embedded_postgres(data_directory / "postgres") as postgres:
        yield postgres.url


def _free_ports(host: str, first: int, count: int, *, is_fixed: bool) -> list[int]:
    """Return `count` successive free ports. Where PORT gives the first one, no others are tried."""
    for start in (first,) if is_fixed else range(first, first + 100):
        asked = range(start, start + count) if start else [0] * count
        with ExitStack() as probes:  # all at once: any free one is to be another one each time
            try:
                return [_bound(probes, host, port) for port in asked]
            except (OSError, OverflowError):
                continue
    taken = f"port {first} is taken" if count == 1 else f"ports {first} to {first + count - 1} are not all free"
    raise ConfigurationError(f"{taken}: set PORT to another one")


def _bound(probes: ExitStack, host: str, port: int) -> int:
    probe = probes.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    probe.bind((host, port))
    free: int = probe.getsockname()[1]
    return free


def _url(host: str, port: int) -> str:
    shown = reachable(host)
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


def anynode_command(python: Path, directory: Path) -> str:
    """Return what to type in `directory` to run `anynode` with the environment that has this `python`: its path where
    that is below `directory`, else its name, as it was installed then.

    `uv run anynode` might choose another Python, and then build the environment again under the nodes that run in it.
    """
    program = python.parent / "anynode"
    return str(program.relative_to(directory)) if program.is_relative_to(directory) else "anynode"


def _say_where_to_go(
    settings: Settings, host: str, nodes: Sequence[DevNode], balancer_ports: Sequence[int], secret: str
) -> None:
    command = anynode_command(Path(sys.executable), Path.cwd())
    urls = [_url(host, node.port) for node in nodes]
    (entry,) = [_url(host, port) for port in balancer_ports] or urls
    token = None
    if settings.jwt_jwks_url is None:
        audience, issuer = settings.jwt_audience, settings.jwt_issuer
        token = make_token(secret, user_id=DEV_USER, audience=audience, issuer=issuer, ttl_seconds=TOKEN_SECONDS)
    fragment = f"/#token={token}" if token else ""
    chat_urls = " ".join(f"--url {url}" for url in urls)
    title = "Anynode is running" + (f" on {len(urls)} nodes" if len(urls) > 1 else "")
    click.secho(f"\n  {title}", fg="green", bold=True)
    click.echo("\n  Open the page      " + click.style(f"{entry}{fragment}", fg="cyan"))
    if (lack := missing()) is not None:
        click.secho(indent(f"\n{lack.strip()}\n", " " * 21), fg="yellow")
    if balancer_ports:
        names = ", ".join(node.name for node in nodes)
        click.secho(f"                     a plain load balancer in front of nodes {names}", dim=True)
    click.echo("\n  Or chat here       " + click.style(f"{command} chat {chat_urls}", fg="cyan"))
    click.echo(f"\n  WebSocket          {', '.join(_socket(url) + '/ws' for url in urls)}")
    click.echo(f"  useChat            {_socket(entry)}{AI_SDK_PATH}")
    click.echo(f"  HTTP               {entry}/docs")
    click.echo(f"  Token (7 days)     {token}" if token else "  Tokens             are signed elsewhere (JWT_JWKS_URL)")
    if settings.agent == "echo":
        click.echo("\n  This is the echo agent. A real model, of any OpenAI-compatible server:")
        click.secho(f"    AGENT=openai OPENAI_API_KEY=… MODEL=gpt-4o-mini {command} dev", dim=True)
        click.secho(
            f"    AGENT=openai OPENAI_BASE_URL=http://127.0.0.1:11434/v1 MODEL=llama3.2 {command} dev", dim=True
        )
    if len(urls) > 1:
        click.echo("\n  Kill a node in mid-answer, from the page's menu or here, and see it go on elsewhere:")
        for node, url in zip(nodes, urls, strict=True):
            click.secho(f"    kill -9 {node.pid or '':<10} # {url} (node {node.name})", dim=True)
    click.secho("\n  Ctrl-C stops everything.\n", dim=True)


def _socket(url: str) -> str:
    return url.replace("http", "ws", 1)
