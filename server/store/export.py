"""`anynode export`: all that is stored of a user, as JSON Lines.

A line is a JSON object, whose `type` says what it is. The first one is the user. Then comes each conversation, oldest
first: the conversation itself, its turns, and its messages in their order. Everything is read in pages, and each page
is of an instant of its own: what is written or deleted meanwhile may be there or not.

The journal, tickets, and what is counted for the user's limits are left out. The journal has the text of messages once
more, for some minutes, and what a running turn has said so far. A ticket is a hash that is good for seconds.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeAlias
from uuid import UUID

import click
import msgspec

from anynode.models.tables import Conversation, Turn, User
from anynode.server.errors import ConfigurationError
from anynode.server.settings import Settings
from anynode.server.startup import open_database
from anynode.server.store.messages import message_to_dict
from anynode.server.store.rows import Rows

Record: TypeAlias = dict[str, Any]

PREFIX: Final = ".anynode-export-"  # of the file that is not yet whole


async def run_export(settings: Settings, user_id: str, output: Path | None, *, is_forced: bool) -> bool:
    """Write what is stored of a user to a file, or to standard output (None). A file that is there is replaced if
    `is_forced`.

    Returns False, and writes nothing, where nothing is stored of the user. Raises ConfigurationError where the database
    cannot be used or the file cannot be written, and DatabaseUnavailable.
    """
    if output is not None:
        check_output(output, is_forced=is_forced)  # before the database is asked for hours
    async with open_database(settings.database_url) as database:
        rows = Rows(database)
        user = await rows.user(user_id)
        if user is None:
            return False
        count = await rows.conversation_count(user_id)
        # Lines on a terminal would be written over by the bar.
        shows_progress = sys.stderr.isatty() and (output is not None or not sys.stdout.isatty())
        with (
            _standard_output() if output is None else whole_file(output, is_forced=is_forced) as file,
            click.progressbar(length=count, label="conversations", file=sys.stderr, hidden=not shows_progress) as bar,
        ):
            async for record in records_of(rows, user):
                file.write(msgspec.json.encode(record) + b"\n")
                bar.update(record["type"] == "conversation")
    return True


async def records_of(rows: Rows, user: User) -> AsyncIterator[Record]:
    """Yield all that is stored of a user, in the order in which it is exported. Raises DatabaseUnavailable."""
    yield {"type": "user", "id": user.id, "email": user.email, "created_at": _time(user.created_at)}
    place: tuple[datetime, UUID] | None = None
    while page := await rows.oldest(user.id, place):
        for conversation in page:
            yield _conversation_record(conversation)
            turn_id: UUID | None = None
            while turns := await rows.turns(user.id, conversation.id, turn_id):
                for turn in turns:
                    yield _turn_record(turn)
                turn_id = turns[-1].id
            position = 0
            while messages := await rows.page(user.id, conversation.id, position):
                for message in messages:
                    yield {
                        "type": "message",
                        "conversation_id": str(conversation.id),
                        **message_to_dict(message),
                        "message_id": message.client_id,
                    }
                position = messages[-1].position
        place = page[-1].created_at, page[-1].id


def _conversation_record(conversation: Conversation) -> Record:
    return {
        "type": "conversation",
        "id": str(conversation.id),
        "client_id": conversation.client_id,
        "title": conversation.title,
        "system_prompt": conversation.system_prompt,
        "metadata": conversation.metadata,
        "created_at": _time(conversation.created_at),
        "updated_at": _time(conversation.updated_at),
    }


def _turn_record(turn: Turn) -> Record:
    return {
        "type": "turn",
        "conversation_id": str(turn.conversation_id),
        "id": str(turn.id),
        "status": turn.status,
        "usage": turn.usage,
        "error": turn.error,
        "created_at": _time(turn.created_at),
        "finished_at": _time(turn.finished_at),
    }


def _time(value: datetime | None) -> str | None:
    return None if value is None else value.isoformat()


@contextmanager
def _standard_output() -> Iterator[BinaryIO]:
    stream = sys.stdout.buffer
    try:
        yield stream
        stream.flush()
    except BrokenPipeError:  # the reader has what it wanted; click ends the command
        raise
    except OSError as error:
        raise ConfigurationError(f"standard output cannot be written: {error.strerror}") from error


# The file.


@contextmanager
def whole_file(path: Path, *, is_forced: bool) -> Iterator[BinaryIO]:
    """Open a file that only its owner may read, and that gets its name once it is written without an error.

    A file of this name is replaced if `is_forced`. Raises ConfigurationError where it is there, or cannot be written.
    """
    check_output(path, is_forced=is_forced)
    try:
        handle, name = tempfile.mkstemp(prefix=PREFIX, dir=path.parent)  # with mode 0600
        beside = Path(name)
        try:
            with open(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(handle)
            if is_forced:
                beside.replace(path)
            else:
                _give_new_name(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror}") from error


def check_output(path: Path, *, is_forced: bool) -> None:
    """Raise ConfigurationError where a file of this name is not to be replaced."""
    if is_forced and path.exists() and not path.is_file():
        raise ConfigurationError(f"{path} is no file that can be replaced")
    if not is_forced and os.path.lexists(path):
        raise ConfigurationError(f"{path} is there already: give another name, or --force to replace it")


def _give_new_name(beside: Path, path: Path) -> None:
    """Give a file a name that no other file has. Raises ConfigurationError where another one has it by now."""
    try:
        os.link(beside, path)
    except FileExistsError:
        check_output(path, is_forced=False)
        raise
    except OSError:  # a file system without links
        check_output(path, is_forced=False)
        beside.rename(path)
