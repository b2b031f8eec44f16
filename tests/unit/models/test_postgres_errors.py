"""What is told of an error of Postgres."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tortoise.exceptions import IntegrityError

from anynode.models.postgres_errors import describe, is_of_postgres

CANARY = "canary of a user"


def reported(sqlstate: str, message: str, **fields: Any) -> asyncpg.PostgresError:
    """The error that asyncpg makes of what a server reports."""
    codes = {"message": "M", "detail": "D", "hint": "H", "context": "W"}
    codes |= {"table_name": "t", "column_name": "c", "constraint_name": "n"}
    told = {"C": sqlstate, **{codes[name]: value for name, value in {"message": message, **fields}.items()}}
    error: asyncpg.PostgresError = asyncpg.PostgresError.new(told)
    return error


def test_asyncpg_shows_the_row_itself() -> None:
    # Or nothing here would be needed.
    assert CANARY in str(reported("23514", "violates", detail=f"Failing row contains ({CANARY})."))


def test_a_violation_names_table_and_constraint_and_no_row() -> None:
    error = reported(
        "23514",
        'new row for relation "messages" violates check constraint "short"',
        detail=f"Failing row contains ({CANARY}).",
        hint=CANARY,
        context=CANARY,
        table_name="messages",
        constraint_name="short",
    )
    assert describe(error) == (
        'new row for relation "messages" violates check constraint "short" '
        "(SQLSTATE 23514, table messages, constraint short)"
    )


@pytest.mark.parametrize(
    ("sqlstate", "message", "told"),
    [
        ("22P02", f'invalid input syntax for type integer: "{CANARY}"', "invalid input syntax for type integer"),
        ("22003", f'value "{CANARY}" is out of range for type integer', "value … is out of range for type integer"),
        ("22007", f'value "a"b {CANARY}" is wrong', "value … is wrong"),
        ("42601", f'syntax error at or near "{CANARY}"', "syntax error at or near …"),
        ("P0001", f"bad words: {CANARY}", "a function of the database raised an error"),
        ("28P01", 'password authentication failed for user "ada"', 'password authentication failed for user "ada"'),
        ("42P01", 'relation "none" does not exist\n' + CANARY, 'relation "none" does not exist'),
    ],
)
def test_a_message_is_told_without_the_values_in_it(sqlstate: str, message: str, told: str) -> None:
    assert describe(reported(sqlstate, message)) == f"{told} (SQLSTATE {sqlstate})"


def test_an_argument_that_asyncpg_refuses_is_not_told() -> None:
    error = asyncpg.DataError(f"invalid input for query argument $1: '{CANARY}' (expected int)")
    assert describe(error) == "invalid input for query argument $1 (SQLSTATE 22000)"


def test_what_the_orm_makes_of_an_error_is_told_by_that() -> None:
    error = IntegrityError(reported("23505", "duplicate key", detail=CANARY))
    assert CANARY in str(error)
    assert is_of_postgres(error)
    assert describe(error) == "duplicate key (SQLSTATE 23505)"


@pytest.mark.parametrize(("error", "told"), [(OSError("one\n two"), "one two"), (TimeoutError(), "")])
def test_another_error_is_told_in_one_line_as_it_is(error: BaseException, told: str) -> None:
    assert (describe(error), is_of_postgres(error)) == (told, False)


@given(st.from_regex(r"[0-9A-Z]{5}", fullmatch=True), st.text(max_size=20), st.text(max_size=20))
def test_details_and_hints_are_never_told(sqlstate: str, detail: str, hint: str) -> None:
    line = describe(reported(sqlstate, "message", detail=f"{CANARY}{detail}", hint=f"{CANARY}{hint}"))
    assert CANARY not in line
    assert len(line.splitlines()) == 1
