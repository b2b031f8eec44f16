"""The file of statements: each name is there once and is used; and how named parameters become numbers."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

import anynode.models
from anynode.models.queries import bind, read, statements, translate

SOURCES = Path(str(files(anynode.models)))
SECTIONS = re.split(r"^(?=-- (?:name|fragment): )", (SOURCES / "queries.sql").read_text(), flags=re.MULTILINE)[1:]


def test_every_statement_is_used_and_every_used_one_is_there() -> None:
    code = "".join(path.read_text() for path in SOURCES.glob("*.py"))
    assert set(re.findall(r'\bbind\(\s*"(\w+)"', code)) == set(statements())


def test_no_name_is_given_twice() -> None:
    names = re.findall(r"^-- name: (\w+)$", (SOURCES / "queries.sql").read_text(), re.MULTILINE)
    assert sorted(names) == sorted(set(names)) == sorted(statements())


def test_every_marker_is_read_as_one() -> None:
    markers = re.findall(r"^.*(?:name|fragment):.*$", "".join(SECTIONS), re.MULTILINE)
    assert len(markers) == len(SECTIONS)
    assert len([marker for marker in markers if "name:" in marker]) == len(statements())


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.split()[2])
def test_a_statement_says_what_it_does_and_names_the_file_of_each_function_that_it_calls(section: str) -> None:
    comment = " ".join(re.findall(r"^-- (?!name:|fragment:|include:)(.*)$", section, re.MULTILINE))
    assert re.match(r"[A-Z][a-z]+ ", comment)
    named = set(re.findall(r"models/functions/(\w+)\.sql", comment))
    assert named == set(re.findall(r"\banynode_(\w+)\(", section))


@pytest.mark.parametrize("name", sorted(statements()))
def test_a_statement_is_one_and_without_comments(name: str) -> None:
    sql = statements()[name].sql
    assert sql
    assert "--" not in sql
    assert ";" not in sql


@pytest.mark.parametrize("name", sorted(statements()))
def test_the_parameters_of_a_statement_are_numbered_without_a_gap(name: str) -> None:
    statement = statements()[name]
    numbers = {int(number) for number in re.findall(r"\$(\d+)", statement.sql)}
    assert numbers == set(range(1, len(statement.parameters) + 1))


def test_the_arguments_of_a_statement_are_put_in_the_order_of_its_parameters() -> None:
    sql, arguments, user_id = bind(
        "read_events", conversation_id="c", user_id="u", events_max=10, cursor=7, bytes_max=9
    )
    assert "WHERE c.id = $4 AND c.user_id = $5" in sql
    assert arguments == (7, 10, 9, "c", "u")
    assert user_id == "u"


def test_a_statement_with_one_parameter_or_none_is_bound_too() -> None:
    assert bind("redeem_ticket", hash="h").arguments == ("h",)
    assert bind("delete_expired_tickets").arguments == ()
    assert bind("delete_expired_tickets").user_id is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"turn_id": 1}, r"find_turn do not fit; missing: user_id\."),
        ({}, r"find_turn do not fit; missing: turn_id, user_id\."),
        ({"turn_id": 1, "user_id": 2, "id": 3}, r"find_turn do not fit; unknown: id\."),
        ({"turn_id": 1, "user": 2}, r"find_turn do not fit; missing: user_id; unknown: user\."),
    ],
)
def test_arguments_that_do_not_fit_are_refused_when_they_are_given(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        bind("find_turn", **arguments)


@pytest.mark.parametrize("name", ["redeem_ticket", "delete_expired_tickets"])
def test_an_unknown_argument_is_refused_whatever_the_number_of_parameters(name: str) -> None:
    with pytest.raises(TypeError, match="unknown: other"):
        bind(name, other=1)


def test_an_unknown_statement_is_an_error() -> None:
    with pytest.raises(KeyError):
        bind("no_such_statement")


@pytest.mark.parametrize(
    ("text", "sql", "parameters"),
    [
        ("SELECT :a, :b", "SELECT $1, $2", ("a", "b")),
        ("SELECT :b, :a, :b", "SELECT $1, $2, $1", ("b", "a")),
        ("SELECT :a::text[]::uuid[], x::int", "SELECT $1::text[]::uuid[], x::int", ("a",)),
        ("SELECT :ab, :a, :a_1", "SELECT $1, $2, $3", ("ab", "a", "a_1")),
        ("SELECT ':a', 'it''s :b', :c", "SELECT ':a', 'it''s :b', $1", ("c",)),
        (r"SELECT E'it\'s :a', e':b', :c", r"SELECT E'it\'s :a', e':b', $1", ("c",)),
        (r"SELECT 'a\', :b", r"SELECT 'a\', $1", ("b",)),
        ('SELECT ":a", "x"":b", :c', 'SELECT ":a", "x"":b", $1', ("c",)),
        ("SELECT $$:a$$, $x$ :b $$ $x$, :c", "SELECT $$:a$$, $x$ :b $$ $x$, $1", ("c",)),
        ("SELECT 1 -- it's :a\n, :b", "SELECT 1 -- it's :a\n, $1", ("b",)),
        ("SELECT 1 /* :a\n:b */, :c", "SELECT 1 /* :a\n:b */, $1", ("c",)),
        ("SELECT f(x := :a, y => :b)", "SELECT f(x := $1, y => $2)", ("a", "b")),
        ("SELECT a[1:n], a[b:c], a[f(1):g[2]:d], a[:n]", "SELECT a[1:n], a[b:c], a[f(1):g[2]:d], a[$1]", ("n",)),
        ("SELECT p -> 'a' ->> :a, (:b)", "SELECT p -> 'a' ->> $1, ($2)", ("a", "b")),
    ],
)
def test_named_parameters_are_numbered_by_their_first_appearance(
    text: str, sql: str, parameters: tuple[str, ...]
) -> None:
    statement = translate("name", text)
    assert (statement.sql, statement.parameters) == (sql, parameters)


def test_a_numbered_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match=r"The statement wrong has \$1; parameters are written :name\."):
        translate("wrong", "SELECT $1, :a")


def test_a_statement_includes_a_fragment_that_comes_before_it() -> None:
    text = "-- fragment: f\n-- Why.\nWITH a AS (SELECT :x)\n\n-- name: s\n-- include: f\n, b AS (SELECT :y)\nSELECT;\n"
    (statement,) = read(text).values()
    assert statement.sql == "WITH a AS (SELECT $1)\n, b AS (SELECT $2)\nSELECT"
    assert statement.parameters == ("x", "y")


def test_a_fragment_that_does_not_come_before_is_refused() -> None:
    with pytest.raises(ValueError, match="No fragment f precedes its use"):
        read("-- name: s\n-- include: f\nSELECT;\n\n-- fragment: f\nWITH\n")


def test_a_name_that_is_given_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="more than once: s"):
        read("-- name: s\nSELECT 1;\n\n-- name: s\nSELECT 2;\n")
