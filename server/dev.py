"""`anynode dev`: everything on one machine, and a terminal that says where to go."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Final

import click

from models.migrate import migrate
from server.agents.load import check_agent, check_tools
from server.auth import make_token
from server.configured import on_database
from server.embedded_postgres import embedded_postgres
from server.errors import ConfigurationError
from server.settings import Settings, read_settings

DEV_USER: Final = "dev"
TOKEN_SECONDS: Final = 7 * 86_400
READY_SECONDS: Final = 30.0
# Pages of other people's development servers that may connect.
DEV_ORIGINS: Final = ",".join(f"http://{host}:{port}" for host in ("localhost", "127.0.0.1") for port in (3000, 5173))


def dev_secret(data_directory: Path) -> str:
    """The secret that `anynode dev` signs its tokens with; made once, kept beside its database."""
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
        os.link(fresh, path)  # whoever comes second keeps the first one's
    except FileExistsError:
        pass
    finally:
        fresh.unlink()
    return path.read_text()


def run_dev(environment: Mapping[str, str], *, nodes: int, data_directory: Path) -> None:
    """Run until a signal. Raises ConfigurationError."""
    settings = read_settings(environment)
    check_agent(settings.agent)
    check_tools(settings.tools)
    # SIGINT too: a shell that starts us in the background has it ignored.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        with _database(settings, data_directory) as database_url:
            applied = on_database(database_url, migrate)
            if applied:
                click.secho(f"  migrated: {', '.join(applied)}", dim=True)
            host = environment.get("HOST") or "127.0.0.1"
            ports = _free_ports(host, settings.port, nodes, is_fixed="PORT" in environment)
            secret = settings.jwt_secret or dev_secret(data_directory)
            shared = {
                "DRAIN_SECONDS": "1",
                "ALLOWED_ORIGINS": DEV_ORIGINS,
                **environment,
                "HOST": host,
                "DATABASE_URL": database_url,
                **({} if settings.jwt_jwks_url else {"JWT_SECRET": secret}),
            }
            with _running(shared, ports) as processes:
                _wait_until_ready(host, ports, processes)
                _say_where_to_go(settings, host, ports, secret, processes)
                _watch(dict(zip(ports, processes, strict=True)))
    except KeyboardInterrupt:
        click.secho("\n  stopped", dim=True)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


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
    """Successive free ports. One that was asked for by PORT is not exchanged for another."""
    for start in (first,) if is_fixed else range(first, first + 100):
        if start == 0:
            return [_free_port(host, 0) or 0 for _ in range(count)]
        ports = [_free_port(host, port) for port in range(start, start + count)]
        if None not in ports:
            return [port for port in ports if port is not None]
    raise ConfigurationError(f"port {first} is taken: set PORT to another one")


def _free_port(host: str, port: int) -> int | None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return None
        free: int = probe.getsockname()[1]
        return free


@contextmanager
def _running(environment: Mapping[str, str], ports: Sequence[int]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """A node for each port. In sessions of their own, so that Ctrl-C reaches only us and they can drain; they stop by
    themselves when we die, as their input then ends."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for port in ports:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "server.cli", "serve", "--stop-with-input", "--quiet"],
                    env={**environment, "PORT": str(port)},
                    stdin=subprocess.PIPE,
                    start_new_session=True,
                )
            )
        yield processes
    finally:
        try:
            _stop(processes, float(environment["DRAIN_SECONDS"]) + 10)
        finally:  # also at an impatient second Ctrl-C
            for process in processes:
                process.kill()
                process.wait()


def _stop(processes: Sequence[subprocess.Popen[bytes]], within_seconds: float) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + within_seconds
    for process in processes:
        try:
            process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            click.secho("  a node does not stop and is killed", fg="yellow", err=True)


def _wait_until_ready(host: str, ports: Sequence[int], processes: Sequence[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + READY_SECONDS
    for port, process in zip(ports, processes, strict=True):
        while not _is_ready(host, port):
            if process.poll() is not None:
                raise ConfigurationError("a node could not start; what is wrong is said above")
            if time.monotonic() > deadline:
                raise ConfigurationError(f"the node on port {port} is not ready after {READY_SECONDS:g} seconds")
            time.sleep(0.05)


def _is_ready(host: str, port: int) -> bool:
    try:
        with urllib.request.urlopen(f"{_url(host, port)}/readyz", timeout=2) as response:  # noqa: S310
            return bool(response.status == 200)
    except OSError:
        return False


def _url(host: str, port: int) -> str:
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    return f"http://{shown}:{port}"


def _say_where_to_go(
    settings: Settings, host: str, ports: Sequence[int], secret: str, processes: Sequence[subprocess.Popen[bytes]]
) -> None:
    urls = [_url(host, port) for port in ports]
    token = None
    if settings.jwt_jwks_url is None:
        audience, issuer = settings.jwt_audience, settings.jwt_issuer
        token = make_token(secret, user_id=DEV_USER, audience=audience, issuer=issuer, ttl_seconds=TOKEN_SECONDS)
    fragment = f"/#token={token}" if token else ""
    nodes = " ".join(f"--url {url}" for url in urls)
    title = "Anynode is running" + (f" on {len(urls)} nodes" if len(urls) > 1 else "")
    click.secho(f"\n  {title}", fg="green", bold=True)
    click.echo("\n  Open the page      " + click.style(f"{urls[0]}{fragment}", fg="cyan"))
    for url in urls[1:]:
        click.echo("                     " + click.style(f"{url}{fragment}", fg="cyan"))
    click.echo("\n  Or chat here       " + click.style(f"uv run anynode chat {nodes}", fg="cyan"))
    sockets = ", ".join(url.replace("http", "ws", 1) + "/ws" for url in urls)
    click.echo(f"\n  WebSocket          {sockets}")
    click.echo(f"  HTTP               {urls[0]}/docs")
    click.echo(f"  Token (7 days)     {token}" if token else "  Tokens             are signed elsewhere (JWT_JWKS_URL)")
    if settings.agent == "echo":
        click.echo("\n  This is the echo agent. A real model, of any OpenAI-compatible server:")
        click.secho("    AGENT=openai OPENAI_API_KEY=… MODEL=gpt-4o-mini uv run anynode dev", dim=True)
        click.secho(
            "    AGENT=openai OPENAI_BASE_URL=http://127.0.0.1:11434/v1 MODEL=llama3.2 uv run anynode dev", dim=True
        )
    if len(urls) > 1:
        click.echo("\n  Kill a node in mid-answer, and see it go on elsewhere:")
        for url, process in zip(urls, processes, strict=True):
            click.secho(f"    kill -9 {process.pid:<10} # {url}", dim=True)
    click.secho("\n  Ctrl-C stops everything.\n", dim=True)


def _watch(processes: dict[int, subprocess.Popen[bytes]]) -> None:
    while processes:
        for port, process in list(processes.items()):
            status = process.poll()
            if status is not None:
                del processes[port]
                click.secho(f"  the node on port {port} ended (status {status})", fg="yellow", err=True)
        time.sleep(0.2)
    raise ConfigurationError("all nodes have ended")
