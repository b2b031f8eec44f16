"""What a node deletes when its time is over."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any, cast

import pytest

from anynode.models.database import Database, Unavailable
from anynode.server.engine import housekeeping as module
from anynode.server.engine.housekeeping import delete_expired, pause_seconds


class Done(Exception):
    """The script is over."""


class Kept:
    """A database that keeps what it is asked to do, and in which `turns` and `messages` have expired."""

    def __init__(self, *, turns: int = 0, messages: int = 0) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.turns = turns
        self.messages = messages
        self.errors: list[Exception] = []

    async def fetch(self, name: str, *arguments: Any) -> list[object]:
        self.asked.append((name, *arguments))
        if self.errors:
            raise self.errors.pop(0)
        kind = {"delete_expired_events": "turns", "delete_expired_messages": "messages"}.get(name)
        if kind is None:
            return []
        deleted = min(getattr(self, kind), arguments[1])
        setattr(self, kind, getattr(self, kind) - deleted)
        return [None] * deleted


async def clean_up(monkeypatch: pytest.MonkeyPatch, kept: Kept, rounds: int = 1) -> list[float]:
    """Clean up that many times; returns the pauses."""
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == rounds:
            raise Done

    monkeypatch.setattr(module, "asyncio", SimpleNamespace(sleep=sleep))
    with pytest.raises(Done):
        await delete_expired(cast(Database, kept), retention_seconds=40.0)
    return pauses


async def test_all_that_expires_is_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Kept()
    assert await clean_up(monkeypatch, kept) == [10.0]
    assert sorted(name for name, *_ in kept.asked) == [
        "delete_expired_events",
        "delete_expired_messages",
        "delete_expired_tickets",
        "forget_deletions",
    ]
    assert ("forget_deletions", 60.0) in kept.asked
    assert ("delete_expired_events", 40.0, 100) in kept.asked
    assert ("delete_expired_messages", 40.0, 1000) in kept.asked


async def test_a_statement_is_made_again_while_there_is_more_than_it_deletes_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = Kept(turns=250, messages=2000)
    await clean_up(monkeypatch, kept)
    names = [name for name, *_ in kept.asked]
    assert (kept.turns, kept.messages) == (0, 0)
    assert (names.count("delete_expired_events"), names.count("delete_expired_messages")) == (3, 3)


async def test_what_fails_is_logged_and_tried_again_after_a_pause(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept = Kept(turns=1)
    kept.errors = [Unavailable("OSError: refused"), KeyError("broken")]
    with caplog.at_level(logging.WARNING):
        await clean_up(monkeypatch, kept, rounds=3)
    assert kept.turns == 0
    assert [record.getMessage() for record in caplog.records] == [
        "expired events wait for Postgres: OSError: refused",
        "expired events could not be deleted",
    ]


@pytest.mark.parametrize(
    ("retention_seconds", "pause"), [(0.06, 0.1), (0.4, 0.1), (4.0, 1.0), (240.0, 60.0), (600.0, 60.0), (1e9, 60.0)]
)
def test_a_pause_is_a_quarter_of_the_retention_within_bounds(retention_seconds: float, pause: float) -> None:
    assert pause_seconds(retention_seconds) == pytest.approx(pause)
