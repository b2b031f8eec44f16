"""Users' e-mail addresses: which of them a node writes, and when; with the database replaced."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from anynode.models.database import Unavailable
from anynode.server.auth import Identity
from anynode.server.engine import users as module
from anynode.server.engine.users import (
    EMAILS_AT_ONCE,
    NOTED_MAX,
    REMEMBERED_MAX,
    REMEMBERED_SECONDS,
    WRITE_SECONDS,
    EmailNotes,
    Emails,
)
from tests.kit.statements import Answers

NOW = 1000.0


def notes_of(*noted: tuple[str, str]) -> EmailNotes:
    notes = EmailNotes()
    for user_id, email in noted:
        notes.note(user_id, email, NOW)
    return notes


def written(notes: EmailNotes, now: float = NOW) -> dict[str, str]:
    """Write what is new at a time; returns it."""
    taken = dict(notes.take())
    notes.keep(now)
    return taken


def test_a_new_address_is_written_once() -> None:
    notes = notes_of(("ada", "ada@example.org"), ("ada", "ada@example.org"))
    assert written(notes) == {"ada": "ada@example.org"}
    notes.note("ada", "ada@example.org", NOW + REMEMBERED_SECONDS - 1)
    assert not notes.has_new
    assert written(notes) == {}


def test_a_written_address_is_written_again_after_a_while_as_others_may_have_changed_it() -> None:
    notes = notes_of(("ada", "ada@example.org"))
    written(notes)
    notes.note("ada", "ada@example.org", NOW + REMEMBERED_SECONDS)
    assert written(notes) == {"ada": "ada@example.org"}


def test_the_last_of_several_addresses_is_written() -> None:
    notes = notes_of(("ada", "old@example.org"), ("ada", "new@example.org"))
    assert written(notes) == {"ada": "new@example.org"}
    for email in ("other@example.org", "new@example.org"):
        notes.note("ada", email, NOW)
    assert written(notes) == {"ada": "new@example.org"}


def test_an_address_that_is_being_written_is_not_written_again_and_another_one_is() -> None:
    notes = notes_of(("ada", "ada@example.org"), ("bob", "bob@example.org"))
    notes.take()
    notes.note("ada", "ada@example.org", NOW)
    notes.note("bob", "robert@example.org", NOW)
    notes.keep(NOW)
    assert written(notes) == {"bob": "robert@example.org"}


def test_what_could_not_be_written_is_written_later_unless_there_is_a_newer_address() -> None:
    notes = notes_of(("ada", "ada@example.org"), ("bob", "bob@example.org"))
    notes.take()
    notes.note("bob", "robert@example.org", NOW)
    notes.put_back()
    assert written(notes) == {"ada": "ada@example.org", "bob": "robert@example.org"}


def test_what_cannot_be_written_is_dropped_until_it_is_noted_again() -> None:
    notes = notes_of(("ada", "ada@example.org"))
    notes.take()
    notes.drop()
    assert not notes.has_new
    notes.note("ada", "ada@example.org", NOW)
    assert notes.has_new


def test_one_statement_has_a_bounded_number_of_users_the_first_first() -> None:
    notes = notes_of(*((f"user{number}", "a@example.org") for number in range(EMAILS_AT_ONCE + 1)))
    first = written(notes)
    assert len(first) == EMAILS_AT_ONCE
    assert "user0" in first
    assert written(notes) == {f"user{EMAILS_AT_ONCE}": "a@example.org"}


def test_beyond_the_bound_only_users_who_wait_already_are_noted() -> None:
    notes = notes_of(*((f"user{number}", "a@example.org") for number in range(NOTED_MAX)))
    notes.note("late", "late@example.org", NOW)
    notes.note("user0", "b@example.org", NOW)
    waiting: dict[str, str] = {}
    while notes.has_new:
        waiting |= written(notes)
    assert len(waiting) == NOTED_MAX
    assert (waiting.get("late"), waiting["user0"]) == (None, "b@example.org")


def test_of_the_written_addresses_those_used_last_are_remembered() -> None:
    notes = notes_of(("idle", "idle@example.org"), ("busy", "busy@example.org"))
    written(notes)
    for number in range(REMEMBERED_MAX - 1):
        notes.note(f"user{number}", "a@example.org", NOW)
        if number == REMEMBERED_MAX // 2:
            notes.note("busy", "busy@example.org", NOW)
        if number % EMAILS_AT_ONCE == 0:
            written(notes)
    while notes.has_new:
        written(notes)
    for user_id in ("busy", "idle"):
        notes.note(user_id, f"{user_id}@example.org", NOW)
    assert written(notes) == {"idle": "idle@example.org"}


# The task.


class Done(Exception):
    """The script is over."""


class Users(Answers):
    """A database that keeps the addresses of users; the first statements fail with its `errors`."""

    def __init__(self, *errors: Exception) -> None:
        super().__init__()
        self.errors = list(errors)
        self.emails: dict[str, str] = {}

    def answer(self, name: str, arguments: Mapping[str, Any]) -> list[object]:
        assert name == "write_emails"
        if self.errors:
            raise self.errors.pop(0)
        self.emails |= dict(zip(arguments["user_ids"], arguments["emails"], strict=True))
        return []


async def run(monkeypatch: pytest.MonkeyPatch, emails: Emails, rounds: int = 1) -> list[float]:
    """Write that many times; returns the pauses."""
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == rounds:
            raise Done

    monkeypatch.setattr(module, "asyncio", SimpleNamespace(sleep=sleep))
    with pytest.raises(Done):
        await emails.run()
    return pauses


def emails_of(users: Users) -> Emails:
    return Emails(users.database)


async def test_what_tokens_tell_is_written_in_one_statement_and_then_there_is_a_pause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    users = Users()
    emails = emails_of(users)
    emails.note(Identity("ada", 1.0, "ada@example.org"))
    emails.note(Identity("bob", 1.0, "bob@example.org"))
    assert await run(monkeypatch, emails) == [WRITE_SECONDS]
    assert users.emails == {"ada": "ada@example.org", "bob": "bob@example.org"}
    assert len(users.asked) == 1


async def test_without_anything_new_no_statement_is_made() -> None:
    users = Users()
    emails = emails_of(users)
    emails.note(Identity("ada", 1.0))
    running = asyncio.create_task(emails.run())
    for _ in range(5):
        await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait((running,))
    assert users.asked == []


async def test_while_postgres_is_away_the_addresses_wait(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    users = Users(Unavailable("OSError: refused"), Unavailable("OSError: refused"))
    emails = emails_of(users)
    emails.note(Identity("ada", 1.0, "ada@example.org"))
    with caplog.at_level(logging.WARNING):
        await run(monkeypatch, emails, rounds=3)
    assert users.emails == {"ada": "ada@example.org"}
    assert [record.getMessage() for record in caplog.records] == [
        "e-mail addresses wait for Postgres: OSError: refused"
    ] * 2


async def test_addresses_that_postgres_refuses_are_dropped_and_later_ones_are_written(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    users = Users(KeyError("broken"))
    emails = emails_of(users)
    emails.note(Identity("ada", 1.0, "ada@example.org"))

    async def sleep(seconds: float) -> None:
        if users.emails:
            raise Done
        emails.note(Identity("bob", 1.0, "bob@example.org"))

    monkeypatch.setattr(module, "asyncio", SimpleNamespace(sleep=sleep))
    with caplog.at_level(logging.ERROR), pytest.raises(Done):
        await emails.run()
    assert users.emails == {"bob": "bob@example.org"}
    assert [record.getMessage() for record in caplog.records] == ["e-mail addresses could not be written"]


def test_an_address_waits_with_the_time_of_the_newest_token_that_told_it() -> None:
    notes = EmailNotes()
    for issued_at in (5.0, 7.0, 6.0):
        notes.note("ada", "ada@example.org", NOW, issued_at)
    notes.take()
    assert notes.issued_at() == {"ada": 7.0}
    notes.note("ada", "ada@example.org", NOW, 8.0)  # the same address, with a newer token
    notes.put_back()
    notes.take()
    assert notes.issued_at() == {"ada": 8.0}
    notes.keep(NOW)
    assert notes.issued_at() == {}
    notes.note("ada", "new@example.org", NOW, 9.0)
    notes.take()
    assert notes.issued_at() == {"ada": 9.0}


@pytest.mark.parametrize("ending", ["keep", "drop"])
def test_nothing_is_remembered_of_tokens_whose_address_was_written_or_dropped(ending: str) -> None:
    notes = notes_of(("ada", "ada@example.org"), ("bob", "bob@example.org"))
    notes.take()
    notes.note("bob", "new@example.org", NOW, 3.0)
    notes.keep(NOW) if ending == "keep" else notes.drop()
    assert notes._issued_at.keys() == {"bob"}
