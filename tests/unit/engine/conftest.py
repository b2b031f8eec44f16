"""A limit for tests that wait: one that waits for what never comes fails, and does not hang."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Final

import pytest

SECONDS_MAX: Final = 10.0  # far more than any of them takes


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    """Fail a test that takes too long, also while it is cleaned up."""

    def fail(number: int, frame: object) -> None:
        pytest.fail(f"the test has not ended within {SECONDS_MAX:g} seconds")

    earlier = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, SECONDS_MAX, SECONDS_MAX)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, earlier)
