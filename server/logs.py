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
from typing import Any, Final, TypeAlias

import asyncpg

from anynode.models.postgres_errors import describe, is_of_postgres

LINES_MAX: Final = 20  # of one kind that are logged …
WINDOW_SECONDS: Final = 60.0  # … in this time: nobody can flood the log
KINDS_MAX: Final = 1_000  # kinds of lines that are remembered; the one that was not seen for longest is forgotten first

Kind: TypeAlias = tuple[object, ...]

_DETAIL: Final = "\nDETAIL:"  # how asyncpg begins what may hold a row, also where its text is quoted by another error
_USER_INFO: Final = re.compile(r"(://)[^\s\"'<>]*@")  # up to the last @: a password may hold one that is not encoded


def configure_logging(level: int) -> None:
    """Log to standard error, and keep tokens and other people's mistakes out of the log."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(CleanFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.addFilter(Repeated())
    logging.basicConfig(level=level, handlers=[handler])
    # At INFO uvicorn logs the path of every WebSocket with its query, in which some client may put a token.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.getLogger("anynode").setLevel(level)
    # It also logs a traceback for every peer that sends invalid UTF-8, and any peer can.
    logging.getLogger("uvicorn.error").addFilter(lambda record: not str(record.msg).startswith("Invalid UTF-8"))


def seldom(kind: str) -> dict[str, str]:
    """Return the `extra` of a line that is logged once a minute, together with all other lines of this kind."""
    return {"seldom": kind}


class Repeated(logging.Filter):
    """Lets some lines of a kind through in a window, and has the next one say how many were left out.

    Lines that `seldom` marks are of the kind that it names: one in a window. Other warnings and errors are of one kind
    where they say the same, whatever they say it of: LINES_MAX in a window. Lines below a warning are let through.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._monotonic = monotonic
        self._kinds: dict[Kind, tuple[float, int]] = {}  # when the window began, and the lines in it

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is logged. It is told how many lines were left out before it."""
        kind, lines_max = _kind_of(record)
        if kind is None:
            return True
        now = self._monotonic()
        began, lines = self._kinds.pop(kind, (now, 0))
        if now >= began + WINDOW_SECONDS:
            record.left_out = max(0, lines - lines_max)
            began, lines = now, 0
        self._kinds[kind] = (began, lines + 1)
        if len(self._kinds) > KINDS_MAX:
            del self._kinds[next(iter(self._kinds))]
        return lines < lines_max


def _kind_of(record: logging.LogRecord) -> tuple[Kind | None, int]:
    """Return the kind of a record and how many of it are logged in a window; None where all of them are."""
    if (named := getattr(record, "seldom", None)) is not None:
        return ("seldom", named), 1
    if record.levelno < logging.WARNING:
        return None, 0
    error = record.exc_info[0] if record.exc_info else None
    return (record.name, record.levelno, str(record.msg), error), LINES_MAX


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
