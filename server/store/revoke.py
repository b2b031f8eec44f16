"""`anynode revoke`: refuses the tokens of a user, or of all users, that were issued before now.

One statement writes the revocation; every node hears of it with its next watch (server/auth/revocations.py). Turns that
are to be stopped are asked twice: a node that had not heard yet may have admitted a message after the first time.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Final

import click

from anynode.models.revocations import revoke, stop_turns
from anynode.server.engine.postgres_errors import unavailable_as_client_error
from anynode.server.settings import Settings
from anynode.server.startup import open_database

HEARD_SECONDS: Final = 1.0  # by then every node that works has had the answers to two watches


async def run_revoke(settings: Settings, user_id: str | None, *, stops_turns: bool) -> None:
    """Refuse the tokens of a user (None: of all users), ask their turns to stop if told so, and print what was done.

    Raises ConfigurationError where the database cannot be used, and DatabaseUnavailable.
    """
    async with open_database(settings.database_url) as database:
        with unavailable_as_client_error():
            not_before = await revoke(database, user_id)
            whose = "of all users" if user_id is None else f"of the user {user_id}"
            at = datetime.fromtimestamp(not_before, UTC).isoformat(timespec="milliseconds")
            click.echo(f"tokens {whose} that were issued before {at} are refused")
            if not stops_turns:
                return
            stopped = await stop_turns(database, user_id)
            await asyncio.sleep(HEARD_SECONDS)
            stopped += await stop_turns(database, user_id)
            click.echo(f"{stopped:,} running turn{'' if stopped == 1 else 's'} asked to stop")
