"""Statements that a fake database is given, by their names in `queries.sql`."""

from __future__ import annotations

from typing import Any

from anynode.models.queries import Bound, statements


def named(bound: Bound) -> tuple[str, dict[str, Any]]:
    """Return the name of a statement, and its arguments by the names of its parameters."""
    statement = next(each for each in statements().values() if each.sql == bound.sql)
    return statement.name, dict(zip(statement.parameters, bound.arguments, strict=True))
