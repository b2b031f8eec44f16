"""The log of a process: where it goes, what is kept out of it, and that nobody can flood it."""

from __future__ import annotations

import logging
from time import monotonic
from typing import Final, NamedTuple

LINES_MAX: Final = 20  # of one kind that are written …
WINDOW_SECONDS: Final = 60.0  # … in this time; more are only counted
KINDS_MAX: Final = 1_000  # kinds that are remembered; a further one forgets the oldest


class Kind(NamedTuple):
    """What lines have in common that say the same: all but what they say it of."""

    logger: str
    level: int
    template: str
    error: str


class RepeatedLines:
    """Which lines of a log are written, and how many were left out. Given the time; no I/O."""

    def __init__(self) -> None:
        self._windows: dict[Kind, tuple[float, int]] = {}  # when the first line was written, and lines since

    def take(self, kind: Kind, now: float) -> bool:
        """Count a line; return whether it is to be written."""
        began, lines = self._windows.get(kind, (now, 0))
        if kind not in self._windows and len(self._windows) >= KINDS_MAX:
            del self._windows[next(iter(self._windows))]
        self._windows[kind] = (began, lines + 1)
        return lines < LINES_MAX

    def left_out(self, now: float) -> list[tuple[Kind, int]]:
        """Return how many lines of each kind were left out in the windows that are over, and begin new ones."""
        over = []
        while self._windows:
            kind, (began, lines) = next(iter(self._windows.items()))
            if now - began < WINDOW_SECONDS:
                break
            del self._windows[kind]
            if lines > LINES_MAX:
                over.append((kind, lines - LINES_MAX))
        return over


class BoundedHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to standard error; of warnings and errors that say the same, only the first ones of each minute."""

    def __init__(self) -> None:
        super().__init__()
        self._repeated = RepeatedLines()

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, unless there were too many of its kind. First tell what was left out before."""
        now = monotonic()
        for kind, count in self._repeated.left_out(now):
            text = "left out %d more lines like: %s"
            super().emit(logging.LogRecord(kind.logger, kind.level, "", 0, text, (count, kind.template.strip()), None))
        if record.levelno < logging.WARNING or self._repeated.take(_kind_of(record), now):
            super().emit(record)


def configure_logging(level: int) -> None:
    """Log to standard error, and keep tokens and other people's mistakes out of the log."""
    logging.basicConfig(
        level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", handlers=[BoundedHandler()]
    )
    # At INFO uvicorn logs the path of every WebSocket with its query, in which some client may put a token.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.getLogger("anynode").setLevel(level)
    # It also logs a traceback for every peer that sends invalid UTF-8, and any peer can.
    logging.getLogger("uvicorn.error").addFilter(lambda record: not str(record.msg).startswith("Invalid UTF-8"))


def _kind_of(record: logging.LogRecord) -> Kind:
    error = record.exc_info[0] if record.exc_info else None
    return Kind(record.name, record.levelno, str(record.msg), "" if error is None else error.__name__)
