"""What a node deletes when its time is over."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from anynode.models.database import Unavailable
from anynode.server.engine import housekeeping as module
from anynode.server.engine.housekeeping import delete_expired, pause_seconds
from tests.kit.statements import Answers


class Done(Exception):
    """The script is over."""


class Kept(Answers):
    """A database in which `turns` and `messages` have expired; the first statements fail with its `errors`."""

    def __init__(self, *, turns: int = 0, messages: int = 0) -> None:
        super().__init__()
        self.expired = {"delete_expired_events": turns, "delete_expired_messages": messages}
        self.errors: list[Exception] = []

    def answer(self, name: str, arguments: Mapping[str, Any]) -> list[object]:
        if self.errors:
            raise self.errors.pop(0)
        if name not in self.expired:
            return []
        (limit,) = (value for name, value in arguments.items() if name.endswith("_max"))
        deleted = min(self.expired[name], limit)
        self.expired[name] -= deleted
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
        await delete_expired(kept.database, retention_seconds=40.0)
    return pauses


async def test_all_that_expires_is_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Kept()
    assert await clean_up(monkeypatch, kept) == [10.0]
    assert sorted(name for name, *_ in kept.asked) == [
        "delete_expired_events",
        "delete_expired_messages",
        "delete_expired_tickets",
        "forget_deletions",
        "forget_revocations",
    ]
    arguments = {name: list(given.values()) for name, given in kept.asked}
    assert arguments["forget_deletions"] == [60.0]
    assert arguments["forget_revocations"] == [366 * 86_400.0]
    assert arguments["delete_expired_events"] == [40.0, 100]
    assert arguments["delete_expired_messages"] == [40.0, 1000]


async def test_a_statement_is_made_again_while_there_is_more_than_it_deletes_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = Kept(turns=250, messages=2000)
    await clean_up(monkeypatch, kept)
    names = [name for name, *_ in kept.asked]
    assert set(kept.expired.values()) == {0}
    assert (names.count("delete_expired_events"), names.count("delete_expired_messages")) == (3, 3)


async def test_what_fails_is_logged_and_tried_again_after_a_pause(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept = Kept(turns=1)
    kept.errors = [Unavailable("OSError: refused"), KeyError("broken")]
    with caplog.at_level(logging.WARNING):
        await clean_up(monkeypatch, kept, rounds=3)
    assert set(kept.expired.values()) == {0}
    assert [record.getMessage() for record in caplog.records] == [
        "expired events wait for Postgres: OSError: refused",
        "expired events could not be deleted",
    ]


@pytest.mark.parametrize(
    ("retention_seconds", "pause"), [(0.06, 0.1), (0.4, 0.1), (4.0, 1.0), (240.0, 60.0), (600.0, 60.0), (1e9, 60.0)]
)
def test_a_pause_is_a_quarter_of_the_retention_within_bounds(retention_seconds: float, pause: float) -> None:
    assert pause_seconds(retention_seconds) == pytest.approx(pause)
