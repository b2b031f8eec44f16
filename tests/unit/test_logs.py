"""The log: lines that say the same are written a few times a minute, and counted."""

from __future__ import annotations

import io
import logging

import pytest

from anynode.server import logs
from anynode.server.logs import KINDS_MAX, LINES_MAX, WINDOW_SECONDS, BoundedHandler, Kind, RepeatedLines

KIND = Kind("a", logging.WARNING, "it failed: %s", "")


def other(number: int) -> Kind:
    """A kind of lines that no other number has."""
    return Kind("a", logging.WARNING, f"{number}", "")


def test_some_lines_of_a_kind_are_written_in_a_window_and_the_others_counted() -> None:
    repeated = RepeatedLines()
    assert [repeated.take(KIND, 1.0) for _ in range(LINES_MAX + 5)] == [True] * LINES_MAX + [False] * 5
    assert repeated.take(other(1), 1.0)
    assert repeated.left_out(WINDOW_SECONDS) == []
    assert repeated.left_out(1.0 + WINDOW_SECONDS) == [(KIND, 5)]
    assert repeated.left_out(1.0 + WINDOW_SECONDS) == []
    assert repeated.take(KIND, 1.0 + WINDOW_SECONDS)


def test_only_so_many_kinds_are_remembered() -> None:
    repeated = RepeatedLines()
    for number in range(3 * KINDS_MAX):
        repeated.take(other(number), 0.0)
    assert len(repeated.__dict__["_windows"]) == KINDS_MAX


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time as the handler sees it, which a test changes."""
    now = [0.0]
    monkeypatch.setattr(logs, "monotonic", lambda: now[0])
    return now


def test_a_flood_of_warnings_becomes_some_lines_and_one_that_counts_the_others(clock: list[float]) -> None:
    written = io.StringIO()
    handler = BoundedHandler()
    handler.setStream(written)
    logger = logging.Logger("anynode.test")
    logger.addHandler(handler)
    for number in range(1000):
        logger.warning("a peer said %d", number)
        logger.info("a turn ended: %d", number)
    lines = written.getvalue().splitlines()
    assert sum("peer" in line for line in lines) == LINES_MAX
    assert sum("turn" in line for line in lines) == 1000
    clock[0] = WINDOW_SECONDS
    logger.info("later")
    assert written.getvalue().splitlines()[-2:] == [
        f"left out {1000 - LINES_MAX} more lines like: a peer said %d",
        "later",
    ]


def test_errors_of_different_kinds_are_different_lines(clock: list[float]) -> None:
    written = io.StringIO()
    handler = BoundedHandler()
    handler.setStream(written)
    logger = logging.Logger("anynode.test")
    logger.addHandler(handler)
    for kind in (ValueError, KeyError):
        for _ in range(LINES_MAX + 1):
            try:
                raise kind("x")
            except (LookupError, ValueError):
                logger.exception("it failed")
    assert written.getvalue().count("it failed") == 2 * LINES_MAX
