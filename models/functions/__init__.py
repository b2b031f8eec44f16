"""The SQL functions, one file each: the current body under a header of comments. And how migrations load them.

To change a function, edit its file and add a migration that loads it again with `load_functions`. A fresh database runs
all migrations in order, so an earlier migration then loads a newer body than it did when it was written. That is fine:

- `anynode.models.migrate` applies all missing migrations in one transaction, so nothing calls a function in between.
  No migration calls one itself.
- Only the last migration that loads a function needs to be right: it leaves the file's body, in every database.
- Bodies are not checked while they are loaded, because a newer body may use a column that a later migration adds.
  tests/database/test_schema.py checks them.

Three rules follow. The arguments of a function and the columns of its result never change: such a change is a new
function with a file of its own. A migration that drops a function takes its name off the lists of earlier migrations,
and its file is deleted. A function that a released node calls is dropped one release later (docs/upgrading.md).
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from tortoise.migrations.operations import RunSQL


@cache
def function_names() -> frozenset[str]:
    """Return the names that have a file; each is the name of a function without `anynode_`."""
    names = (file.name for file in files(__name__).iterdir())
    return frozenset(name.removesuffix(".sql") for name in names if name.endswith(".sql"))


def function_sql(name: str) -> str:
    """Return the text of one file. Raises LookupError for a name that has none."""
    if name not in function_names():
        raise LookupError(f"There is no models/functions/{name}.sql.")
    return files(__name__).joinpath(f"{name}.sql").read_text(encoding="utf-8")


def load_functions(*names: str) -> RunSQL:
    """Return the operation of a migration that makes or replaces these functions. Raises LookupError."""
    bodies = "\n".join(function_sql(name) for name in names)
    return RunSQL(f"SET LOCAL check_function_bodies = off;\n{bodies}\nSET LOCAL check_function_bodies = on;")
