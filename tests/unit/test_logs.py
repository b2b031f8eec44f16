"""The log: no values of rows, no passwords of URLs, and no line over and over."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator

import asyncpg
import pytest

from anynode.server.logs import KINDS_MAX, LINES_MAX, WINDOW_SECONDS, CleanFormatter, Repeated, seldom, show_uncaught

CANARY = "canary"


class Log:
    """A logger as the process has it, its lines, and the time by which lines are seldom."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._output = io.StringIO()
        handler = logging.StreamHandler(self._output)
        handler.setFormatter(CleanFormatter("%(levelname)s %(message)s"))
        handler.addFilter(Repeated(lambda: self.now))
        self.logger = logging.Logger("test")
        self.logger.addHandler(handler)

    @property
    def text(self) -> str:
        """All that was written."""
        return self._output.getvalue()


@pytest.fixture
def log() -> Log:
    """A log of its own."""
    return Log()


def violation() -> asyncpg.PostgresError:
    """An error whose text shows a row."""
    fields = {"C": "23514", "M": "violates a constraint", "D": f"({CANARY})", "H": CANARY, "n": "short"}
    error: asyncpg.PostgresError = asyncpg.PostgresError.new(fields)
    error.add_note(CANARY)
    return error


def raise_alone() -> None:
    raise violation()


def raise_as_a_cause() -> None:
    try:
        raise violation()
    except asyncpg.PostgresError as error:
        raise RuntimeError("outer") from error


def raise_as_a_context() -> None:
    try:
        raise violation()
    finally:
        raise RuntimeError("outer")


def raise_in_groups() -> None:
    raise ExceptionGroup("outer", [ValueError("fine"), ExceptionGroup("inner", [violation()])])


def raise_quoted() -> None:
    raise RuntimeError(f"it failed: {violation()}")


def raise_of_an_argument() -> None:
    try:
        raise ValueError(f"invalid UUID {CANARY!r}")
    except ValueError as error:
        raise asyncpg.DataError(f"invalid input for query argument $1: {CANARY!r} (wrong)") from error


ALL = [raise_alone, raise_as_a_cause, raise_as_a_context, raise_in_groups, raise_quoted, raise_of_an_argument]


@pytest.mark.parametrize("fail", ALL)
def test_a_traceback_shows_no_row(log: Log, fail: Callable[[], None]) -> None:
    try:
        fail()
    except Exception:
        log.logger.exception("it failed")
    assert CANARY not in log.text
    assert f"in {fail.__name__}" in log.text or fail is raise_in_groups
    assert "Traceback (most recent call last):" in log.text


@pytest.mark.parametrize("fail", ALL[:4])
def test_a_traceback_says_what_postgres_refused(log: Log, fail: Callable[[], None]) -> None:
    try:
        fail()
    except Exception:
        log.logger.exception("it failed")
    assert "CheckViolationError: violates a constraint (SQLSTATE 23514, constraint short)\n" in log.text
    assert ("outer" in log.text) == (fail is not raise_alone)


def test_an_error_in_a_line_shows_no_row(log: Log) -> None:
    log.logger.warning("it failed: %s %d", violation(), 7)
    log.logger.warning(violation())
    log.logger.warning("fine: %s", OSError("refused"))
    assert log.text.splitlines() == [
        "WARNING it failed: violates a constraint (SQLSTATE 23514, constraint short) 7",
        "WARNING violates a constraint (SQLSTATE 23514, constraint short)",
        "WARNING fine: refused",
    ]


def test_a_line_takes_arguments_by_name(log: Log) -> None:
    log.logger.warning("%(a)s", {"a": "b"})
    assert log.text == "WARNING b\n"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://ada:hunter2@keys.example/x?y", "https://…@keys.example/x?y"),
        ("postgresql://ada:hun@ter2@h/db", "postgresql://…@h/db"),
        ("https://hunter2@keys.example", "https://…@keys.example"),
        ("https://keys.example/x", "https://keys.example/x"),
    ],
)
def test_a_url_is_shown_without_user_and_password(log: Log, url: str, shown: str) -> None:
    log.logger.warning("no keys from %s: try again", url)
    try:
        raise ValueError(f"no answer, url='{url}'")
    except ValueError:
        log.logger.exception("it failed")
    assert f"no keys from {shown}: try again\n" in log.text
    assert f"no answer, url='{shown}'\n" in log.text
    assert "hunter2" not in log.text
    assert "ter2" not in log.text


def test_what_ends_the_process_is_shown_without_rows(capsys: pytest.CaptureFixture[str]) -> None:
    error = violation()
    show_uncaught(type(error), error, None)
    assert capsys.readouterr().err.endswith("(SQLSTATE 23514, constraint short)\n")
    show_uncaught(ValueError, ValueError("https://ada:hunter2@keys.example"), None)
    assert capsys.readouterr().err == "ValueError: https://…@keys.example\n"


# Lines that are seldom.


def lines(log: Log) -> Iterator[str]:
    """The messages of the log."""
    return (line.removeprefix("WARNING ") for line in log.text.splitlines())


def test_a_kind_of_line_is_logged_once_a_minute_and_says_how_many_were_left_out(log: Log) -> None:
    for number in range(4):
        log.logger.warning("%d waits", number, extra=seldom("waiting"))
        log.logger.warning("other", extra=seldom(f"other {number}"))
    log.now += WINDOW_SECONDS - 1
    log.logger.warning("again", extra=seldom("waiting"))
    log.now += 1
    log.logger.warning("%s", "later", extra=seldom("waiting"))
    log.now += WINDOW_SECONDS
    log.logger.warning("at last", extra=seldom("waiting"))
    assert list(lines(log)) == [
        *("0 waits", *["other"] * 4),
        "later (4 more such lines were left out)",
        "at last",
    ]


def test_a_flood_of_warnings_that_say_the_same_becomes_some_lines_and_a_count(log: Log) -> None:
    for number in range(1000):
        log.logger.warning("a peer said %d", number)
        log.logger.info("a turn ended: %d", number)
    assert log.text.count("a peer said") == LINES_MAX
    assert log.text.count("a turn ended") == 1000
    log.now += WINDOW_SECONDS
    log.logger.warning("a peer said %d", 1001)
    assert log.text.splitlines()[-1] == f"WARNING a peer said 1001 ({1000 - LINES_MAX} more such lines were left out)"


def test_errors_of_different_kinds_are_different_lines(log: Log) -> None:
    for kind in (ValueError, KeyError):
        for _ in range(LINES_MAX + 1):
            try:
                raise kind("x")
            except (LookupError, ValueError):
                log.logger.exception("it failed")
    assert log.text.count("it failed") == 2 * LINES_MAX


def test_the_kinds_that_are_remembered_are_bounded(log: Log) -> None:
    for number in range(KINDS_MAX + 1):
        log.logger.warning("a line", extra=seldom(str(number)))
    log.logger.warning("the newest", extra=seldom(str(KINDS_MAX)))
    log.logger.warning("the oldest", extra=seldom("0"))
    assert "the newest" not in log.text
    assert "the oldest" in log.text
