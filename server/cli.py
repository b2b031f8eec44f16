"""The command `anynode`. Each subcommand loads what it runs, and no more: a node must be back soon."""

from __future__ import annotations

import asyncio
import json
import os
import runpy
import sys
from collections.abc import Coroutine, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

import click
import platformdirs

from anynode.server.auth import EMAIL_CHARACTERS_MAX, USER_ID_CHARACTERS_MAX, is_email, limits_of, make_token
from anynode.server.errors import ClientError, ConfigurationError, Unauthorized
from anynode.server.limits import UNLIMITED
from anynode.server.logs import show_uncaught
from anynode.server.settings import Settings, read_settings
from anynode.server.startup import on_database, one_line_errors

_DURATIONS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}

Result = TypeVar("Result")


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
@click.option("--email", help="The user's e-mail address: the token's `email`.  [default: none]")
@click.option("--limits", help="""The user's own limits, as JSON: '{"turns": 5}'.  [default: those of the settings]""")
@data_directory
def token(user: str, ttl: float, email: str | None, limits: str | None, data_dir: Path) -> None:
    """Print a token signed with JWT_SECRET, or with the secret of `anynode dev` where that is not set."""
    settings = read_settings(os.environ)
    if not user or len(user) > USER_ID_CHARACTERS_MAX or not user.isprintable():
        raise ConfigurationError(f"--user takes from 1 to {USER_ID_CHARACTERS_MAX} printable characters")
    if email is not None and not is_email(email):
        raise ConfigurationError(f"--email takes an address with one @, of at most {EMAIL_CHARACTERS_MAX} characters")
    click.echo(_token(settings, data_dir, user, ttl, email, None if limits is None else _limits(limits)))


@cli.command(name="export")
@click.option("--user", required=True, help="The user's id: the token's `sub`.")
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), help="File to write.  [default: standard output]"
)
@click.option("--force", is_flag=True, help="Replace the file if it is there.")
def export_command(user: str, output: Path | None, force: bool) -> None:
    """Write all that is stored of a user as JSON Lines: the user, then each conversation with its turns and messages.

    The status is 1 where nothing is stored of the user.
    """
    from anynode.server.store.export import run_export

    settings = read_settings(os.environ)
    _check_stored_user(user)
    if not _run(run_export(settings, user, output, is_forced=force)):
        _fail(f"nothing is stored of the user {user}")


@cli.command(name="forget")
@click.option("--user", required=True, help="The user's id: the token's `sub`.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def forget_command(user: str, yes: bool) -> None:
    """Delete all that is stored of a user, whose running turns are stopped.

    It may be interrupted and run again. All tokens of the user that were issued before now are refused from then on, as
    by `anynode revoke`. A newer token stores the user again: take away first what lets the user get one.
    """
    from anynode.server.store.forget import run_forget

    settings = read_settings(os.environ)
    _check_stored_user(user)
    if not _run(run_forget(settings, user, may_ask=not yes)):
        _fail("the user goes on writing, so there is always more: let the user get no newer token, and run it again")


@cli.command(name="revoke")
@click.option("--user", help="The user's id: the token's `sub`.")
@click.option("--all", "is_all", is_flag=True, help="All users.")
@click.option("--stop-turns", is_flag=True, help="Stop the running turns too.  [default: they go on]")
def revoke_command(user: str | None, is_all: bool, stop_turns: bool) -> None:
    """Refuse all tokens of a user that were issued before now, on every node, and end what is open with them.

    Sockets and streams end within 2 seconds. A token that is issued a second later is good again, so take away first
    what lets the user get one. Tickets are refused with their tokens.
    """
    from anynode.server.store.revoke import run_revoke

    settings = read_settings(os.environ)
    if is_all == (user is not None):
        raise ConfigurationError("revoke takes either --user ID or --all")
    if user is not None:
        _check_stored_user(user)
    _run(run_revoke(settings, user, stops_turns=stop_turns))


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
    sys.excepthook = show_uncaught
    with one_line_errors():
        cli()


def _check_stored_user(user: str) -> None:
    from anynode.server.store.given import is_user_id

    if not is_user_id(user):
        raise ConfigurationError(f"--user takes from 1 to {USER_ID_CHARACTERS_MAX} characters of UTF-8")


def _run(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a command on the database to its end. What makes it fail on the way is told in one line, with status 1."""
    try:
        return asyncio.run(work)
    except ClientError as error:
        _fail(error.message)


def _fail(message: str) -> NoReturn:
    click.secho(f"anynode: {message}", fg="red", err=True)
    sys.exit(1)


def _limits(text: str) -> Mapping[str, int]:
    """Return the limits of an option. Raises ConfigurationError."""
    try:
        limits: Mapping[str, int] = json.loads(text)
        limits_of(limits, UNLIMITED)
    except (ValueError, RecursionError):
        raise ConfigurationError('--limits takes a JSON object such as {"turns": 5}') from None
    except Unauthorized as error:
        raise ConfigurationError(f"--limits: {error.message}") from None
    return limits


def _token(
    settings: Settings,
    data_directory: Path,
    user: str,
    ttl_seconds: float,
    email: str | None = None,
    limits: Mapping[str, int] | None = None,
) -> str:
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
        audience_claim=settings.jwt_audience_claim,
        email=email,
        limits=limits,
    )


if __name__ == "__main__":
    main()
