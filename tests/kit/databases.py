"""A migrated template database, and fresh copies of it."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from anynode.models.migrate import migrate
from tests.kit.harness import sql, with_database

TEMPLATE = f"anynode_template_{os.getpid()}"


def make_template(url: str) -> None:
    """Make the migrated database that fresh ones are copies of."""
    asyncio.run(sql(url, f"CREATE DATABASE {TEMPLATE}"))
    asyncio.run(migrate(with_database(url, TEMPLATE)))


@contextmanager
def fresh_database(postgres_url: str) -> Iterator[str]:
    """A fresh, migrated database, dropped at the end."""
    name = f"test_{uuid.uuid4().hex}"
    asyncio.run(sql(postgres_url, f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}"))
    yield with_database(postgres_url, name)
    asyncio.run(sql(postgres_url, f"DROP DATABASE {name} WITH (FORCE)"))


@contextmanager
def empty_database(postgres_url: str) -> Iterator[str]:
    """A database without any table, dropped at the end."""
    name = f"empty_{uuid.uuid4().hex}"
    asyncio.run(sql(postgres_url, f"CREATE DATABASE {name}"))
    yield with_database(postgres_url, name)
    asyncio.run(sql(postgres_url, f"DROP DATABASE {name} WITH (FORCE)"))
