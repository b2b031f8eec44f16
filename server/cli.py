"""The command `anynode`. Each subcommand loads what it runs, and no more: a node must be back soon."""

from __future__ import annotations

import asyncio
import os
import runpy
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import click
import platformdirs

from anynode.server.auth import make_token
from anynode.server.errors import ConfigurationError
from anynode.server.settings import Settings, read_settings
from anynode.server.startup import on_database, one_line_errors

_DURATIONS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class Duration(click.ParamType[float]):
    """A duration: a number of seconds, or a number followed by s, m, h or d."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the duration in seconds."""
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
    """Anynode: a WebSocket chat server for streaming AI answers. Any node can resume a dropped connection."""


@cli.command()
@click.option("--nodes", type=click.IntRange(1, 16), default=1, show_default=True, help="Nodes, on successive ports.")
@data_directory
def dev(nodes: int, data_dir: Path) -> None:
    """Run everything on this machine: Postgres, migrations, the echo agent, the page."""
    from anynode.server.dev.run import run_dev  # here, as serving needs nothing of it

    run_dev(os.environ, nodes=nodes, data_directory=data_dir)


@cli.command()
def serve() -> None:
    """Run one node, for production."""
    from anynode.server.serve import run_node

    run_node(os.environ)


@cli.command(name="migrate")
def migrate_command() -> None:
    """Bring the database's schema up to date. Any number of these may run at once."""
    from anynode.models.migrate import migrate

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
    from anynode.server.client.terminal import chat
    from anynode.server.dev.run import DEV_USER

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
    """Run the command `anynode`."""
    with one_line_errors():
        cli()


def _token(settings: Settings, data_directory: Path, user: str, ttl_seconds: float) -> str:
    if settings.jwt_jwks_url is not None:
        raise ConfigurationError("tokens are signed elsewhere (JWT_JWKS_URL): ask there for one")
    from anynode.server.dev.run import dev_secret

    secret = settings.jwt_secret or dev_secret(data_directory)
    return make_token(
        secret,
        user_id=user,
        audience=settings.jwt_audience,
        issuer=settings.jwt_issuer,
        ttl_seconds=ttl_seconds,
    )


if __name__ == "__main__":
    main()
