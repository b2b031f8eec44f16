"""Fixtures of the database's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.kit.databases import empty_database

MakeEmptyDatabase = Callable[[], str]


@pytest.fixture
def empty_database_url(postgres_url: str) -> Iterator[str]:
    """A database without any table."""
    with empty_database(postgres_url) as url:
        yield url


@pytest.fixture(scope="module")
def make_empty_database(postgres_url: str) -> Iterator[MakeEmptyDatabase]:
    """Makes databases without any table, dropped when the module's tests are over."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(empty_database(postgres_url))
