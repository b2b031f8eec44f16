"""A database without Postgres: it keeps the statements that it is given, and answers each by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from anynode.models.database import Database
from anynode.models.queries import Bound, statements


class Answers:
    """Answers statements with the rows given for their names, and all others with no row; an error is raised."""

    def __init__(self, rows: Mapping[str, Any] | None = None) -> None:
        self.rows: dict[str, Any] = dict(rows or {})
        self.asked: list[tuple[str, dict[str, Any]]] = []  # each with its arguments, by name
        self.database = cast(Database, self)

    async def run(self, statement: Bound, **options: Any) -> Any:
        """Answer a statement."""
        (known,) = (each for each in statements().values() if each.sql == statement.sql)
        arguments = dict(zip(known.parameters, statement.arguments, strict=True))
        self.asked.append((known.name, arguments))
        return self.answer(known.name, arguments)

    def answer(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """Return the rows of a statement, or raise its error."""
        rows = self.rows.get(name, [])
        if isinstance(rows, Exception):
            raise rows
        return rows
