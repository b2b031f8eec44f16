"""The log: standard error, without people's data and secrets, and without the same line over and over.

All loggers of the process write through one handler, so what its formatter takes out is in no line: values of rows
(DETAIL of Postgres's errors), and the user and password of any URL, also in tracebacks and in what libraries log.
"""

from __future__ import annotations

import copy
import logging
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Final

import asyncpg

from anynode.models.postgres_errors import describe, is_of_postgres

SELDOM_SECONDS: Final = 60.0
SELDOM_KINDS_MAX: Final = 1_000  # kinds of lines that are remembered; the oldest is forgotten first

_DETAIL: Final = "\nDETAIL:"  # how asyncpg begins what may hold a row, also where its text is quoted by another error
_USER_INFO: Final = re.compile(r"(://)[^\s\"'<>]*@")  # up to the last @: a password may hold one that is not encoded


def configure_logging(level: int) -> None:
    """Log to standard error, and keep tokens and other people's mistakes out of the log."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(CleanFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.addFilter(Seldom())
    logging.basicConfig(level=level, handlers=[handler])
    # At INFO uvicorn logs the path of every WebSocket with its query, in which some client may put a token.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.getLogger("anynode").setLevel(level)
    # It also logs a traceback for every peer that sends invalid UTF-8, and any peer can.
    logging.getLogger("uvicorn.error").addFilter(lambda record: not str(record.msg).startswith("Invalid UTF-8"))


def seldom(kind: str) -> dict[str, str]:
    """Return the `extra` of a line that is logged once a minute, together with all other lines of this kind."""
    return {"seldom": kind}


class Seldom(logging.Filter):
    """Lets a line of a kind through once in SELDOM_SECONDS; the next one says how many were left out."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._monotonic = monotonic
        self._kinds: dict[str, tuple[float, int]] = {}  # when the last line was logged, and lines left out since

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is logged. It is told how many lines were left out before it."""
        kind = getattr(record, "seldom", None)
        if kind is None:
            return True
        now = self._monotonic()
        logged_at, left_out = self._kinds.pop(kind, (None, 0))
        if logged_at is not None and now < logged_at + SELDOM_SECONDS:
            self._kinds[kind] = (logged_at, left_out + 1)
            return False
        self._kinds[kind] = (now, 0)
        if len(self._kinds) > SELDOM_KINDS_MAX:
            del self._kinds[next(iter(self._kinds))]
        record.left_out = left_out
        return True


class CleanFormatter(logging.Formatter):
    """Formats a record without values of rows and without the user and password of a URL."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, with the traceback of an error behind it."""
        record = copy.copy(record)
        if isinstance(record.msg, BaseException):
            record.msg, record.args = _text_of(record.msg), ()
        if isinstance(record.args, tuple):
            record.args = tuple(_text_of(each) if isinstance(each, BaseException) else each for each in record.args)
        if left_out := getattr(record, "left_out", 0):
            record.msg, record.args = f"{record.getMessage()} ({left_out} more such lines were left out)", ()
        return _without_user_info(super().format(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802  (logging's own name)
        """Return the traceback of `sys.exc_info()`, as `traceback_of` has it."""
        return super().formatException(ei) if ei[1] is None else traceback_of(ei[1])


def traceback_of(error: BaseException) -> str:
    """Return an error's traceback with all that led to it, in which errors of Postgres are described, not quoted."""
    shown = traceback.TracebackException.from_exception(error)
    for part, of, led_to_postgres in _walk(shown, error):
        if is_of_postgres(of) or led_to_postgres or _DETAIL in str(of):
            # What asyncpg could not encode stands in the error that led to its own.
            part._str = "" if led_to_postgres else _text_of(of)  # type: ignore[attr-defined]
            part.__notes__ = None
    return _without_user_info("".join(shown.format()).rstrip("\n"))


def show_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback of an error that ends the process: what `sys.excepthook` is set to."""
    print(traceback_of(error), file=sys.stderr)


def _text_of(error: BaseException) -> str:
    if is_of_postgres(error):
        return describe(error)
    return str(error).partition(_DETAIL)[0]


def _without_user_info(text: str) -> str:
    return _USER_INFO.sub(r"\1…@", text) if "://" in text else text


def _walk(
    shown: traceback.TracebackException, error: BaseException
) -> Iterator[tuple[traceback.TracebackException, BaseException, bool]]:
    """Yield all parts of a traceback with their errors, and whether each led to an error of Postgres."""
    left: list[tuple[traceback.TracebackException | None, BaseException | None, bool]] = [(shown, error, False)]
    while left:
        part, of, led_to_postgres = left.pop()
        if part is None or of is None:
            continue
        yield part, of, led_to_postgres
        leads = isinstance(of, asyncpg.PostgresError)
        left += [(part.__cause__, of.__cause__, leads), (part.__context__, of.__context__, leads)]
        if isinstance(of, BaseExceptionGroup):
            left += [(*pair, False) for pair in zip(part.exceptions or (), of.exceptions, strict=False)]
