"""Reads `queries.sql`: one statement a name."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files

_NAME = re.compile(r"^-- name: (\w+)$", re.MULTILINE)


@cache
def statements() -> dict[str, str]:
    """Every statement of `queries.sql`, by name, without comments."""
    parts = _NAME.split(files("anynode.models").joinpath("queries.sql").read_text())
    return {name: _strip(text) for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def query(name: str) -> str:
    """The SQL of one statement. Raises KeyError for a name that is not in the file."""
    return statements()[name]


def _strip(text: str) -> str:
    lines = (line for line in text.splitlines() if not line.lstrip().startswith("--"))
    return "\n".join(lines).strip().rstrip(";")
