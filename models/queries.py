"""Reads `queries.sql`: one statement a name, with named parameters, and fragments that statements share.

The file is a list of sections:

    -- name: NAME        begins a statement
    -- fragment: NAME    begins a text that statements include
    -- include: NAME     stands for the text of a fragment that comes before

Lines that begin with `--` are comments. In a statement `:name` is a parameter. Parameters are numbered ($1, $2 …) in
the order in which they first appear; a name that appears again keeps its number. Nothing is taken for a parameter in
string literals ('…', E'…', $$…$$, $tag$…$tag$), in quoted identifiers and in comments. The colons of `::type`, of `:=`
and of a slice with two bounds (`a[1:n]`) begin no parameter either.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from operator import itemgetter
from typing import Any, NamedTuple

_SECTION = re.compile(r"^-- (name|fragment): (\w+)$", re.MULTILINE)
_INCLUDE = re.compile(r"^-- include: (\w+)$", re.MULTILINE)
_COMMENT_LINE = re.compile(r"^\s*--.*\n?", re.MULTILINE)
_TOKEN = re.compile(
    r"""
      --[^\n]* | /\*.*?\*/                            # comments
    | \b[Ee]'(?:[^'\\]|\\.|'')*' | '(?:[^']|'')*'     # literals
    | "(?:[^"]|"")*"                                  # identifiers
    | (?P<quote>\$(?:[A-Za-z_]\w*)?\$).*?(?P=quote)   # dollar-quoted literals
    | ::                                              # casts
    | (?<![\w\])]) : (?P<name>[A-Za-z_]\w*)
    | (?P<number>\$\d+)
    """,
    re.VERBOSE | re.DOTALL,
)


class Bound(NamedTuple):
    """A statement and its arguments, in the order of $1, $2 … `user_id` is the user for whom it runs: the argument of
    that name, None for a statement that is no single user's."""

    sql: str
    arguments: tuple[Any, ...]
    user_id: str | None = None


@dataclass(frozen=True, slots=True)
class Statement:
    """A statement with numbered parameters; `parameters` are their names, $1 first."""

    name: str
    sql: str
    parameters: tuple[str, ...]
    pick: Callable[[Mapping[str, Any]], tuple[Any, ...]]


def bind(name: str, /, **arguments: Any) -> Bound:
    """Return a statement with its arguments, each given by the name of its parameter.

    Raises KeyError for a statement that is not in the file, and TypeError where an argument is missing or unknown.
    """
    statement = statements()[name]
    try:
        values = statement.pick(arguments)
    except KeyError:
        values = ()
    # Each parameter was found, so an equal number of arguments means that there is no other.
    if not len(values) == len(arguments) == len(statement.parameters):
        raise TypeError(_mismatch(statement, arguments))
    return Bound(statement.sql, values, arguments.get("user_id"))


@cache
def statements() -> dict[str, Statement]:
    """Return every statement of `queries.sql` by its name."""
    return read(files("anynode.models").joinpath("queries.sql").read_text(encoding="utf-8"))


def read(text: str) -> dict[str, Statement]:
    """Return every statement of a text by its name. Raises ValueError for a text that is not as described above."""
    parts = _SECTION.split(text)
    sections = list(zip(parts[1::3], parts[2::3], parts[3::3], strict=True))
    names = [name for _, name, _ in sections]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"These names are there more than once: {', '.join(sorted(repeated))}.")
    fragments: dict[str, str] = {}
    found: dict[str, Statement] = {}

    def included(match: re.Match[str]) -> str:
        if match[1] not in fragments:
            raise ValueError(f"No fragment {match[1]} precedes its use.")
        return fragments[match[1]]

    for kind, name, body in sections:
        content = _strip(_INCLUDE.sub(included, body))
        if kind == "fragment":
            fragments[name] = content
        else:
            found[name] = translate(name, content)
    return found


def translate(name: str, text: str) -> Statement:
    """Return the statement of a text with named parameters. Raises ValueError for a text with numbered ones."""
    numbers: dict[str, int] = {}

    def numbered(match: re.Match[str]) -> str:
        if match["number"]:
            raise ValueError(f"The statement {name} has {match['number']}; parameters are written :name.")
        if match["name"] is None:
            return match[0]
        return f"${numbers.setdefault(match['name'], len(numbers) + 1)}"

    sql = _TOKEN.sub(numbered, text)
    return Statement(name, sql, tuple(numbers), _picker(tuple(numbers)))


def _picker(parameters: tuple[str, ...]) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
    """Return a function that puts arguments in order; `itemgetter` does it in C, but for one alone makes no tuple."""
    match parameters:
        case ():
            return lambda arguments: ()
        case (only,):
            return lambda arguments: (arguments[only],)
    return itemgetter(*parameters)


def _mismatch(statement: Statement, arguments: Mapping[str, Any]) -> str:
    missing = [name for name in statement.parameters if name not in arguments]
    unknown = [name for name in arguments if name not in statement.parameters]
    faults = [f"missing: {', '.join(missing)}"] * bool(missing) + [f"unknown: {', '.join(unknown)}"] * bool(unknown)
    return f"The arguments of the statement {statement.name} do not fit; {'; '.join(faults)}."


def _strip(text: str) -> str:
    return _COMMENT_LINE.sub("", text).strip().rstrip(";")
