"""How long a node trusts a lease, what becomes of its turns after a renewal, and how it takes turns over."""

from __future__ import annotations

from anynode.server.engine.leases import LeaseClock


def test_a_lease_that_was_never_requested_is_not_trusted() -> None:
    assert LeaseClock(4.0).trusted_until == 0


def test_a_lease_is_trusted_from_when_it_was_requested_however_late_the_answer_comes() -> None:
    lease = LeaseClock(4.0)
    lease.start(110.0)
    assert lease.trusted_until == 114.0


def test_where_the_request_was_repeated_the_first_may_have_been_heard() -> None:
    lease = LeaseClock(4.0)
    lease.start(100.0)
    lease.start(103.0)
    assert lease.trusted_until == 104.0


def test_a_lease_may_be_requested_when_the_clock_begins() -> None:
    lease = LeaseClock(4.0)
    lease.start(0.0)
    lease.start(3.0)
    assert lease.trusted_until == 4.0
