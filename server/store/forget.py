"""`anynode forget`: deletes all that is stored of a user, a conversation at a time.

Each conversation goes as by DELETE over HTTP: its running turn is asked to stop, it is deleted under its own lock, and
the nodes and followers hear of it. So no lock is held for longer than one conversation takes, and the command may be
killed between any two: what is gone is gone, and the next run goes on with what is left. The user's row goes last, with
the tickets. It cannot go while there is a conversation, so a user who writes meanwhile is seen.

The user's tokens are revoked first, so that what is open ends and no old token makes the user again. Only the hash of
the user's id stays, in `revocations`. The row goes when every node that works has heard: what a node had admitted by
then is deleted too.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

import click

from anynode.models.database import Database
from anynode.models.revocations import revoke
from anynode.models.users import delete_user
from anynode.server.engine.node import Node
from anynode.server.engine.postgres_errors import unavailable_as_client_error
from anynode.server.errors import NotFound
from anynode.server.settings import Settings
from anynode.server.startup import open_database
from anynode.server.store.rows import Rows

HEARD_SECONDS: Final = 0.6  # by then every node that works has had the answers to two watches
REVOKED: Final = "the user's older tokens are refused"
ROUNDS_MAX: Final = 5  # the first deletes what is there; the others what was written meanwhile, …
ROUND_CONVERSATIONS_MAX: Final = 200  # … and each of those at most this much: a user may write faster than we delete


@dataclass(slots=True)
class Amount:
    """How much of a user's there is, or was deleted."""

    conversations: int = 0
    messages: int = 0

    def __str__(self) -> str:
        return f"{_number(self.conversations, 'conversation')} with {_number(self.messages, 'message')}"


async def run_forget(settings: Settings, user_id: str, *, may_ask: bool) -> bool:
    """Delete all that is stored of a user, and print what was deleted. `may_ask`: the user of the command is asked.

    Returns False where the user has written something more in each round. Raises ConfigurationError where the database
    cannot be used, and DatabaseUnavailable.
    """
    async with open_database(settings.database_url) as database:
        forgetting = Forgetting(database, Node(settings, database, None), user_id)
        stored = await forgetting.stored()
        if stored is None:
            # A ticket may be there all the same.
            await forgetting.run()
            click.echo(f"nothing is stored of the user {user_id}; {REVOKED}")
            return True
        if may_ask:
            click.confirm(f"Delete the user {user_id} and all that is stored of them: {stored}?", abort=True, err=True)
        is_hidden = not sys.stderr.isatty()
        try:
            with click.progressbar(
                length=stored.conversations, label="conversations", file=sys.stderr, hidden=is_hidden
            ) as bar:
                is_gone = await forgetting.run(on_deleted=lambda: bar.update(1))
        except asyncio.CancelledError:
            click.echo(f"interrupted; {forgetting.told()}; run it again to delete what is left", err=True)
            raise
        click.echo(f"{forgetting.told()}{', and the user' if is_gone else ''}; {REVOKED}")
        return is_gone


class Forgetting:
    """The deletion of one user. `deleted` is what it has deleted so far. All methods raise DatabaseUnavailable."""

    def __init__(self, database: Database, node: Node, user_id: str) -> None:
        self.deleted = Amount()
        self.tickets_deleted = 0
        self._database = database
        self._rows = Rows(database)
        self._node = node
        self._user_id = user_id

    async def stored(self) -> Amount | None:
        """Return how much is stored of the user, or None for a user who is not stored."""
        if await self._rows.user(self._user_id) is None:
            return None
        amount = Amount()
        place: tuple[datetime, UUID] | None = None
        there_now = await self._rows.conversation_count(self._user_id)
        while amount.conversations < there_now and (page := await self._rows.oldest(self._user_id, place)):
            counts = await self._rows.message_counts(self._user_id, [each.id for each in page])
            amount.conversations += len(page)
            amount.messages += sum(counts.values())
            place = page[-1].created_at, page[-1].id
        return amount

    async def run(self, on_deleted: Callable[[], object] = lambda: None) -> bool:
        """Delete everything; `on_deleted` is called after each conversation. Return False where the user has written
        something more by the end of each of ROUNDS_MAX rounds."""
        with unavailable_as_client_error():
            await revoke(self._database, self._user_id)
        heard_at = time.monotonic() + HEARD_SECONDS
        at_most = await self._rows.conversation_count(self._user_id)
        for _ in range(ROUNDS_MAX):
            await self._delete_oldest(at_most, on_deleted)
            await asyncio.sleep(heard_at - time.monotonic())
            at_most = ROUND_CONVERSATIONS_MAX
            with unavailable_as_client_error():
                is_gone, tickets = await delete_user(self._database, self._user_id)
            self.tickets_deleted += tickets
            if is_gone:
                return True
        return False

    def told(self) -> str:
        """Return in words what was deleted."""
        tickets = f" and {_number(self.tickets_deleted, 'ticket')}" if self.tickets_deleted else ""
        return f"deleted {self.deleted}{tickets}"

    async def _delete_oldest(self, at_most: int, on_deleted: Callable[[], object]) -> None:
        while at_most > 0 and (page := await self._rows.oldest(self._user_id)):
            at_most -= len(page)
            counts = await self._rows.message_counts(self._user_id, [each.id for each in page])
            for conversation in page:
                try:
                    await self._node.delete(self._user_id, conversation.id)
                except NotFound:
                    continue  # somebody else was faster
                self.deleted.conversations += 1
                self.deleted.messages += counts.get(conversation.id, 0)
                on_deleted()


def _number(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"
