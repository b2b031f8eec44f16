"""The file of statements: every name is there once, and is used."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import pytest

import anynode.models
from anynode.models.queries import query, statements

SOURCES = Path(str(files(anynode.models)))


def test_every_statement_is_used_and_every_used_one_is_there() -> None:
    code = "".join(path.read_text() for path in SOURCES.glob("*.py"))
    fetched = set(re.findall(r'fetch\(\s*"(\w+)"', code)) | set(re.findall(r'name = "(\w+)" if \w+ else "\w+"', code))
    fetched |= set(re.findall(r'name = "\w+" if \w+ else "(\w+)"', code))
    fetched |= set(re.findall(r'statement, named = "(\w+)"', code))
    assert fetched == set(statements())


def test_no_name_is_given_twice() -> None:
    names = re.findall(r"^-- name: (\w+)$", (SOURCES / "queries.sql").read_text(), re.MULTILINE)
    assert sorted(names) == sorted(set(names)) == sorted(statements())


def test_every_marker_of_a_name_is_read_as_one() -> None:
    markers = re.findall(r"^.*name:.*$", (SOURCES / "queries.sql").read_text(), re.MULTILINE)
    assert len(markers) == len(statements())


@pytest.mark.parametrize("name", sorted(statements()))
def test_a_statement_is_one_and_without_comments(name: str) -> None:
    sql = query(name)
    assert sql
    assert "--" not in sql
    assert ";" not in sql


@pytest.mark.parametrize("name", sorted(statements()))
def test_the_arguments_of_a_statement_are_numbered_without_a_gap(name: str) -> None:
    numbers = {int(number) for number in re.findall(r"\$(\d+)", query(name))}
    assert numbers == set(range(1, len(numbers) + 1))


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(KeyError):
        query("no_such_statement")
