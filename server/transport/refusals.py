"""Counting of refusals by the limit that was reached, for `/metrics`."""

from __future__ import annotations

from typing import Final

from anynode.server import metrics
from anynode.server.errors import ClientError, RateLimited

UNNAMED: Final = "other"  # of limits that have no name


def count_refusal(error: ClientError) -> None:
    """Count an error that a client is told of, if it is the refusal of a limit. Limits are named in the code alone, so
    the labels are few."""
    if isinstance(error, RateLimited):
        metrics.refused.labels(limit=error.limit or UNNAMED).inc()
