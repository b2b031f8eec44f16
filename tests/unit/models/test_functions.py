"""The files of SQL functions: each has a header that says what a caller and a reader must know."""

from __future__ import annotations

import re

import pytest

from anynode.models.functions import function_names, function_sql, load_functions
from anynode.models.queries import statements


@pytest.mark.parametrize("name", sorted(function_names()))
def test_a_function_names_the_statements_and_functions_that_call_it(name: str) -> None:
    (called_by,) = re.findall(r"^-- Called by: (.*(?:\n--     .*)*)$", function_sql(name), re.MULTILINE)
    calls = rf"\banynode_{name}\("
    assert set(re.findall(r"`(\w+)`", called_by)) == {
        statement.name for statement in statements().values() if re.search(calls, statement.sql)
    }
    assert set(re.findall(r"anynode_(\w+)", called_by)) == {
        other for other in function_names() - {name} if re.search(calls, function_sql(other))
    }


@pytest.mark.parametrize("name", sorted(function_names()))
def test_a_function_says_what_it_does_what_it_locks_and_how_it_may_be_repeated(name: str) -> None:
    header = function_sql(name).split("\n\n")[0]
    assert header.startswith(f"-- anynode_{name}: ")
    assert re.findall(r"^-- (Does|Locks|Repeating|Called by): \S", header, re.MULTILINE) == [
        "Does",
        "Locks",
        "Repeating",
        "Called by",
    ]


def test_a_function_without_a_file_cannot_be_loaded() -> None:
    with pytest.raises(LookupError, match=r"models/functions/no_such\.sql"):
        load_functions("admit", "no_such")
