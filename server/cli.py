"""The command `anynode`."""

from __future__ import annotations

import asyncio
import logging
import os
import runpy
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import click
import platformdirs

from anynode.models.migrate import migrate
from anynode.server.agents.load import check_agent, check_tools
from anynode.server.auth import make_token
from anynode.server.client.terminal import chat
from anynode.server.dev.orders import Orders
from anynode.server.dev.run import DEV_USER, dev_secret, run_dev
from anynode.server.errors import ConfigurationError
from anynode.server.serve import listen
from anynode.server.settings import Settings, check_for_production, read_settings
from anynode.server.startup import on_database

_DURATIONS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class Duration(click.ParamType[float]):
    """Seconds, or a number with s, m, h or d behind it."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse it."""
        if isinstance(value, int | float):
            return float(value)
        number, unit = (value[:-1], value[-1]) if value[-1:] in _DURATIONS else (value, "s")
        if not number.isdigit() or not 0 < int(number) * _DURATIONS[unit] <= 10 * 365 * 86_400:
            self.fail(f"{value!r} is not a duration such as 90s, 15m, 8h or 7d (at most ten years)", param, ctx)
        return float(int(number) * _DURATIONS[unit])


data_directory = click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=lambda: Path(platformdirs.user_data_dir("anynode", appauthor=False)),
    help="Where `anynode dev` keeps its database and secret.  [default: the platform's user data folder]",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("anynode"), prog_name="anynode")
def cli() -> None:
    """Anynode: a WebSocket chat server for streaming AI answers. Any node can pick up a reconnect."""


@cli.command()
@click.option("--nodes", type=click.IntRange(1, 16), default=1, show_default=True, help="Nodes, on successive ports.")
@data_directory
def dev(nodes: int, data_dir: Path) -> None:
    """Run everything on this machine: Postgres, migrations, the echo agent, the page."""
    run_dev(os.environ, nodes=nodes, data_directory=data_dir)


@cli.command()
@click.option("--stop-with-input", is_flag=True, hidden=True)
@click.option("--quiet", is_flag=True, hidden=True)
@click.option("--orders", "pipe", type=int, hidden=True, help="The inherited pipe that takes orders for …")
@click.option("--neighbours", "names", default="", hidden=True, help="… the nodes with these names.")
def serve(stop_with_input: bool, quiet: bool, pipe: int | None, names: str) -> None:
    """Run one node, for production."""
    _log(logging.WARNING if quiet else logging.INFO)
    settings = read_settings(os.environ)
    check_for_production(settings)
    check_agent(settings.agent)
    check_tools(settings.tools)
    orders = None if pipe is None else Orders(pipe, names.split(","))
    listen(settings, stop_with_input=stop_with_input, orders=orders)


@cli.command(name="migrate")
def migrate_command() -> None:
    """Bring the database's schema up to date. Any number of these may run at once."""
    settings = read_settings(os.environ)
    applied = on_database(
        settings.database_url, lambda url: migrate(url, progress=lambda name: click.echo(f"applied {name}"))
    )
    if not applied:
        click.echo("the schema is up to date")


@cli.command()
@click.option("--user", required=True, help="The user's id: the token's `sub`.")
@click.option(
    "--ttl", type=Duration(), default="1h", show_default=True, help="How long it is good for: 90s, 15m, 8h, 7d."
)
@data_directory
def token(user: str, ttl: float, data_dir: Path) -> None:
    """Print a token signed with JWT_SECRET, or with the secret of `anynode dev` where that is not set."""
    settings = read_settings(os.environ)
    if not user or len(user) > 255 or not user.isprintable():
        raise ConfigurationError("--user takes from 1 to 255 printable characters")
    click.echo(_token(settings, data_dir, user, ttl))


@cli.command(name="chat")
@click.option(
    "--url", "urls", multiple=True, help="A node; may be given several times. [default: the port of `anynode dev`]"
)
@click.option("--token", "given_token", help="A token. [default: one for `anynode dev`]")
@click.option("--conversation", help="The id of a conversation to go on with.")
@data_directory
def chat_command(urls: tuple[str, ...], given_token: str | None, conversation: str | None, data_dir: Path) -> None:
    """Chat in the terminal. It reconnects and resumes by itself; given several nodes, it hops between them."""
    settings = read_settings(os.environ)
    urls = urls or (f"ws://127.0.0.1:{settings.port}",)
    given_token = given_token or _token(settings, data_dir, DEV_USER, 86_400)
    sys.exit(asyncio.run(chat(urls, given_token, conversation)))


@cli.command(context_settings={"ignore_unknown_options": True, "help_option_names": []}, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(arguments: tuple[str, ...]) -> None:
    """Measure this machine: the product and the floor in turn, from a checkout of the repository."""
    if not Path("bench", "__main__.py").exists():
        raise ConfigurationError("the benchmarks are in the repository: run `anynode bench` at the top of a checkout")
    sys.path.insert(0, "")
    sys.argv = ["anynode bench", *arguments]
    runpy.run_module("bench", run_name="__main__")


def main() -> None:
    """Run the command; what is wrong with the configuration is one line, and status 2."""
    try:
        cli()
    except ConfigurationError as error:
        click.secho(f"anynode: {error}", fg="red", err=True)
        sys.exit(2)


def _token(settings: Settings, data_directory: Path, user: str, ttl_seconds: float) -> str:
    if settings.jwt_jwks_url is not None:
        raise ConfigurationError("tokens are signed elsewhere (JWT_JWKS_URL): ask there for one")
    secret = settings.jwt_secret or dev_secret(data_directory)
    return make_token(
        secret,
        user_id=user,
        audience=settings.jwt_audience,
        issuer=settings.jwt_issuer,
        ttl_seconds=ttl_seconds,
    )


def _log(level: int) -> None:
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # At INFO uvicorn logs the path of every WebSocket with its query, in which some client may put a token.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.getLogger("anynode").setLevel(level)
    # It also logs a traceback for every peer that sends invalid UTF-8, and any peer can.
    logging.getLogger("uvicorn.error").addFilter(lambda record: not str(record.msg).startswith("Invalid UTF-8"))


if __name__ == "__main__":
    main()
