"""Counting of refusals."""

from __future__ import annotations

from anynode.server import metrics
from anynode.server.errors import NotFound, RateLimited
from anynode.server.transport.refusals import count_refusal


def test_refusals_are_counted_by_the_limit_that_was_reached() -> None:
    def counted(limit: str) -> float:
        return float(metrics.refused.labels(limit=limit)._value.get())

    before = counted("turns_max"), counted("other")
    count_refusal(RateLimited(limit="turns_max"))
    count_refusal(RateLimited())
    count_refusal(NotFound())
    assert (counted("turns_max"), counted("other")) == (before[0] + 1, before[1] + 1)
