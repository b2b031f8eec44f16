"""How long a node trusts a lease that it asks for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from anynode.server.engine.leases import Lease


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The monotonic clock, for the test to set."""
    now = [100.0]
    monkeypatch.setattr("anynode.server.engine.leases.time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_a_lease_that_was_never_asked_for_is_not_trusted(clock: list[float]) -> None:
    assert Lease(4.0).trusted_until == 0


def test_a_lease_is_trusted_from_when_it_was_asked_for_however_late_the_answer_comes(clock: list[float]) -> None:
    lease = Lease(4.0)
    clock[0] = 110.0
    lease.is_asked()
    clock[0] = 113.0
    assert lease.trusted_until == 114.0


def test_where_the_asking_was_repeated_the_first_may_have_been_heard(clock: list[float]) -> None:
    lease = Lease(4.0)
    lease.is_asked()
    clock[0] = 103.0
    lease.is_asked()
    assert lease.trusted_until == 104.0
