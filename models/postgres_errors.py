"""What may be told of an error of Postgres: its class, names of the schema, and never a value of a row or statement."""

from __future__ import annotations

import re
from typing import Final

import asyncpg

# SQLSTATEs and classes of them whose messages may quote values. PostgreSQL's own messages of other classes name at most
# tables, columns, constraints and roles.
_QUOTING: Final = ("22", "42601")
_RAISED: Final = "P0"  # RAISE in somebody's function: the message is whatever they wrote
_QUOTED: Final = re.compile(r"""["'].*["']""", re.DOTALL)


def describe(error: BaseException) -> str:
    """Return one line about an error, without its DETAIL, HINT and CONTEXT, which may hold a whole row.

    An error that wraps one of Postgres, as those of the ORM do, is described by that one.
    """
    if isinstance(error, asyncpg.PostgresError):
        return _describe(error)
    if error.args and isinstance(error.args[0], asyncpg.PostgresError):
        return _describe(error.args[0])
    return " ".join(str(error).split())


def is_of_postgres(error: BaseException) -> bool:
    """Return whether an error is one that Postgres reported, or wraps one."""
    return any(isinstance(each, asyncpg.PostgresError) for each in (error, *error.args[:1]))


def _describe(error: asyncpg.PostgresError) -> str:
    state = error.sqlstate or "?"
    message = " ".join(str(error.args[0] if error.args else "").split("\n", 1)[0].split())
    if state.startswith(_QUOTING):
        # asyncpg itself raises such errors for arguments, and quotes the argument behind the colon.
        message = _QUOTED.sub("…", message.partition(": ")[0])
    elif state.startswith(_RAISED):
        message = "a function of the database raised an error"
    facts = [f"SQLSTATE {state}"]
    for name in ("table", "column", "constraint"):
        if value := getattr(error, f"{name}_name", None):
            facts.append(f"{name} {value}")
    return f"{message} ({', '.join(facts)})".strip()
