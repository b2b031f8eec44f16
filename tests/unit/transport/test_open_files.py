"""The limit of open files: how far it is raised, and what is said where that is not far enough."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import pytest

from anynode.server.transport import open_files
from anynode.server.transport.open_files import RESERVED, allow_open_files

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no such limit")
INFINITY = -1


class Limit:
    """A limit of open files that a test makes up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, *, is_fixed: bool = False) -> None:
        self.soft, self.hard, self.is_fixed = soft, hard, is_fixed
        made = SimpleNamespace(
            RLIMIT_NOFILE=7, RLIM_INFINITY=INFINITY, getrlimit=lambda _: (self.soft, self.hard), setrlimit=self._set
        )
        monkeypatch.setattr(open_files, "resource", made)

    def _set(self, kind: int, limits: tuple[int, int]) -> None:
        if self.is_fixed:
            raise ValueError
        self.soft, self.hard = limits


def test_the_soft_limit_is_raised_to_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = Limit(monkeypatch, 1024, 1_048_576)
    assert allow_open_files(20_000, 13) == 20_000
    assert (limit.soft, limit.hard) == (20_013 + RESERVED, 1_048_576)


@pytest.mark.parametrize(("soft", "hard"), [(50_000, 50_000), (50_000, INFINITY), (INFINITY, INFINITY)])
def test_a_limit_that_is_high_enough_stays(monkeypatch: pytest.MonkeyPatch, soft: int, hard: int) -> None:
    limit = Limit(monkeypatch, soft, hard)
    assert allow_open_files(20_000, 13) == 20_000
    assert limit.soft == soft


@pytest.mark.parametrize(("hard", "is_fixed", "allowed"), [(4096, False, 4096), (INFINITY, True, 1024)])
def test_a_limit_that_stays_too_low_is_one_line_and_bounds_the_connections(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, hard: int, is_fixed: bool, allowed: int
) -> None:
    Limit(monkeypatch, 1024, hard, is_fixed=is_fixed)
    with caplog.at_level(logging.WARNING, "anynode"):
        assert allow_open_files(20_000, 13) == allowed - 13 - RESERVED
    (record,) = caplog.records
    assert f"may open {allowed} files" in record.getMessage()
    assert "ulimit -n" in record.getMessage()


def test_where_there_is_no_such_limit_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_files, "resource", None)
    assert allow_open_files(20_000, 13) == 20_000
