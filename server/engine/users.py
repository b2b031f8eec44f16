"""The e-mail addresses of users, as their tokens tell them, written to Postgres apart from everything else.

A token is verified with each connection and each request over HTTP, and few of them tell anything new. So a node notes
each address in memory, which costs a look into a dictionary, and one task writes what is new: at most once a second, in
one statement. An admission has no part in it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Final

from anynode.models.database import Database, Unavailable
from anynode.models.users import write_emails
from anynode.server.auth import Identity
from anynode.server.engine.postgres_errors import warn_of_wait

logger = logging.getLogger("anynode.node")

WRITE_SECONDS: Final = 1.0  # between two statements
WRITE_SECONDS_MAX: Final = 5.0  # for one of them
EMAILS_AT_ONCE: Final = 1000  # users of one statement
NOTED_MAX: Final = 20_000  # users whose addresses wait to be written; further ones are noted with their next token
REMEMBERED_MAX: Final = 20_000  # users whose written addresses are known; as many as a node has connections
REMEMBERED_SECONDS: Final = 600.0  # what other nodes write meanwhile, or delete, is not heard of


class EmailNotes:
    """The addresses that a node has to write, and those that it has written. Given the time; no I/O."""

    def __init__(self) -> None:
        self._noted: dict[str, str] = {}  # user → address, the first noted first
        self._writing: dict[str, str] = {}
        self._written: OrderedDict[str, tuple[str, float]] = OrderedDict()  # … and since when; the last used last
        self._issued_at: dict[str, float] = {}  # of the newest token of each user in the first two

    @property
    def has_new(self) -> bool:
        """Whether there is something to write."""
        return bool(self._noted)

    def note(self, user_id: str, email: str, now: float, issued_at: float = math.inf) -> None:
        """Note the address of a user's newest token, unless it is the last that was noted or written."""
        if user_id in self._issued_at:
            self._issued_at[user_id] = max(self._issued_at[user_id], issued_at)
        if self._last(user_id, now) == email:
            if user_id in self._written:
                self._written.move_to_end(user_id)
        elif user_id in self._noted or len(self._noted) < NOTED_MAX:
            self._noted[user_id] = email
            self._issued_at.setdefault(user_id, issued_at)

    def _last(self, user_id: str, now: float) -> str | None:
        """Return the address that a user has, once what waits is written; None where that is not known."""
        if (waiting := self._noted.get(user_id) or self._writing.get(user_id)) is not None:
            return waiting
        email, written_at = self._written.get(user_id, (None, 0.0))
        return email if now - written_at < REMEMBERED_SECONDS else None

    def take(self) -> Mapping[str, str]:
        """Return what is to be written next. `keep`, `put_back` or `drop` says what became of it."""
        users = [user_id for user_id, _ in zip(self._noted, range(EMAILS_AT_ONCE), strict=False)]
        self._writing = {user_id: self._noted.pop(user_id) for user_id in users}
        return self._writing

    def issued_at(self) -> Mapping[str, float]:
        """Return when the newest tokens were issued that told what was taken (Unix seconds)."""
        return {user_id: self._issued_at[user_id] for user_id in self._writing}

    def keep(self, now: float) -> None:
        """Remember what was taken: it is written since `now`."""
        for user_id, email in self._writing.items():
            self._written[user_id] = email, now
            self._written.move_to_end(user_id)
        while len(self._written) > REMEMBERED_MAX:
            self._written.popitem(last=False)
        self.drop()

    def put_back(self) -> None:
        """Write what was taken later, unless a newer token has told another address by now."""
        self._noted = {**self._writing, **self._noted}
        self._writing = {}

    def drop(self) -> None:
        """Forget what was taken: it cannot be written."""
        for user_id in self._writing:
            if user_id not in self._noted:
                del self._issued_at[user_id]
        self._writing = {}


class Emails:
    """Takes the address of each verified token, and writes those that are new."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._notes = EmailNotes()
        self._has_new = asyncio.Event()

    def note(self, identity: Identity) -> None:
        """Note the address of a token that was verified, if it tells one."""
        if identity.email is not None:
            self._notes.note(identity.user_id, identity.email, time.monotonic(), identity.issued_at)
            if self._notes.has_new:
                self._has_new.set()

    async def run(self) -> None:
        """Write what is new, for ever."""
        while True:
            await self._has_new.wait()
            await self._write()
            if not self._notes.has_new:
                self._has_new.clear()
            await asyncio.sleep(WRITE_SECONDS)

    async def _write(self) -> None:
        started = time.monotonic()
        try:
            await write_emails(
                self._database,
                self._notes.take(),
                issued_at=self._notes.issued_at(),
                within_seconds=WRITE_SECONDS_MAX,
            )
        except Unavailable as error:
            warn_of_wait(logger, "e-mail addresses wait", error)
            self._notes.put_back()
        except Exception:
            logger.exception("e-mail addresses could not be written")
            self._notes.drop()
        else:
            self._notes.keep(started)
