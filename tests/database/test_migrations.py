"""The migrations: applied by any number of processes at once, and told when one is missing."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import asyncpg

from anynode.models.migrate import _LOCK as LOCK
from anynode.models.migrate import migrate
from anynode.models.schema_version import missing_migrations
from tests.kit.harness import sql

ROOT = Path(__file__).parent.parent.parent
WAITING = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND pid <> pg_backend_pid()"
MIGRATIONS = sorted(path.stem for path in (ROOT / "models" / "migrations").glob("0*.py"))


def start_migrate(url: str) -> subprocess.Popen[str]:
    """`anynode migrate` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "anynode.server.cli", "migrate"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "DATABASE_URL": url},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


async def schema_of(url: str) -> list[tuple[Any, ...]]:
    """Every column of the database: table, name, kind, whether it may be null."""
    rows = await sql(
        url,
        "SELECT table_name, column_name, data_type, is_nullable = 'YES' FROM information_schema.columns"
        " WHERE table_schema = 'public' ORDER BY table_name, column_name",
    )
    return [tuple(row) for row in rows]


async def test_five_migrations_at_once_all_succeed(empty_database_url: str, database_url: str) -> None:
    holder = await asyncpg.connect(empty_database_url)
    try:
        # They start together: all five stand before the lock when it is let go.
        async with holder.transaction():
            await holder.execute("SELECT pg_advisory_xact_lock($1)", LOCK)
            processes = [start_migrate(empty_database_url) for _ in range(5)]
            async with asyncio.timeout(60):
                while await holder.fetchval(WAITING) < 5:
                    assert all(process.poll() is None for process in processes), "one did not wait"
    finally:
        await holder.close()
    outputs = await asyncio.gather(*(asyncio.to_thread(process.communicate, timeout=60) for process in processes))
    assert [process.returncode for process in processes] == [0] * 5, outputs
    assert [error for _, error in outputs] == [""] * 5
    applied = "".join(f"applied {name}\n" for name in MIGRATIONS)
    assert sorted(output for output, _ in outputs) == [applied, *["the schema is up to date\n"] * 4]
    assert await schema_of(empty_database_url) == await schema_of(database_url)


def test_a_database_that_cannot_be_reached_is_one_line(tmp_path: Path) -> None:
    process = start_migrate(f"postgresql://nobody@/nothing?host={tmp_path}")
    output, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert output == ""
    assert len(error.splitlines()) == 1
    assert "DATABASE_URL" in error


async def test_an_empty_database_misses_every_migration_until_it_is_migrated(empty_database_url: str) -> None:
    missing = await missing_migrations(empty_database_url)
    assert missing == MIGRATIONS != []
    assert await migrate(empty_database_url) == missing
    assert await missing_migrations(empty_database_url) == []
    assert await migrate(empty_database_url) == []


async def test_a_migration_says_what_it_does(empty_database_url: str) -> None:
    said: list[str] = []
    applied = await migrate(empty_database_url, progress=said.append)
    assert said == applied
