"""Fixtures of the database's tests."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.kit.harness import sql, with_database

MakeEmptyDatabase = Callable[[], str]


@contextmanager
def empty_database(postgres_url: str) -> Iterator[str]:
    """A database without any table, dropped at the end."""
    name = f"empty_{uuid.uuid4().hex}"
    asyncio.run(sql(postgres_url, f"CREATE DATABASE {name}"))
    yield with_database(postgres_url, name)
    asyncio.run(sql(postgres_url, f"DROP DATABASE {name} WITH (FORCE)"))


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
