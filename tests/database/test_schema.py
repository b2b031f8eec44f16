"""The present of the schema: `models/schema.sql` and `models/functions/` say what the migrations together make."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import asyncpg
import pytest

import anynode.models
from anynode.models.functions import function_names, function_sql, load_functions
from anynode.models.migrate import migrate

SCHEMA = files(anynode.models).joinpath("schema.sql").read_text()

# All that is in the schema `public`, but for the table in which Tortoise keeps the names of migrations.
CATALOGUE = {
    "tables": """
        SELECT relname, relkind, relpersistence, relreplident, reloptions FROM pg_class
        WHERE relnamespace = 'public'::regnamespace AND relkind NOT IN ('i', 'I', 't')
            AND relname NOT LIKE 'tortoise_migrations%'
        ORDER BY relname
    """,
    "columns": """
        SELECT c.relname, a.attnum, a.attname, format_type(a.atttypid, a.atttypmod) AS type, a.attnotnull,
               pg_get_expr(d.adbin, d.adrelid) AS default, a.attidentity, a.attgenerated, a.attstorage, a.attcollation
        FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
        LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
        WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' AND a.attnum > 0
            AND c.relname <> 'tortoise_migrations'
        ORDER BY c.relname, a.attnum
    """,
    "constraints": """
        SELECT conrelid::regclass::text AS relname, conname, contype, pg_get_constraintdef(oid) AS definition
        FROM pg_constraint
        WHERE connamespace = 'public'::regnamespace AND conrelid::regclass::text <> 'tortoise_migrations'
        ORDER BY conrelid::regclass::text, conname
    """,
    "indexes": """
        SELECT tablename, indexname, indexdef FROM pg_indexes
        WHERE schemaname = 'public' AND tablename <> 'tortoise_migrations'
        ORDER BY tablename, indexname
    """,
    "functions": """
        SELECT proname, pg_get_functiondef(oid) AS definition FROM pg_proc
        WHERE pronamespace = 'public'::regnamespace
        ORDER BY proname, pg_get_function_identity_arguments(oid)
    """,
    "triggers": "SELECT tgrelid::regclass::text, tgname FROM pg_trigger WHERE NOT tgisinternal ORDER BY 1, 2",
}


async def catalogue_of(url: str, kind: str) -> list[tuple[Any, ...]]:
    connection = await asyncpg.connect(url)
    try:
        return [tuple(row) for row in await connection.fetch(CATALOGUE[kind])]
    finally:
        await connection.close()


async def load(url: str, *texts: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        for text in texts:
            await connection.execute(text)
    finally:
        await connection.close()


@pytest.fixture(scope="module")
def migrated_url(make_empty_database: Callable[[], str]) -> str:
    """A database that all migrations were applied to, one after another."""
    url = make_empty_database()
    asyncio.run(migrate(url))
    return url


@pytest.fixture(scope="module")
def written_url(make_empty_database: Callable[[], str]) -> str:
    """A database made of `schema.sql` and the files of functions; here Postgres checks their bodies."""
    url = make_empty_database()
    asyncio.run(load(url, SCHEMA, *(function_sql(name) for name in sorted(function_names(), key=uses_others))))
    return url


def uses_others(name: str) -> bool:
    """Whether the body names another function, which an SQL function's then needs."""
    return len(re.findall(r"\banynode_\w+\(", function_sql(name))) > 1


@pytest.mark.parametrize("kind", CATALOGUE)
async def test_the_migrations_make_what_the_files_say(migrated_url: str, written_url: str, kind: str) -> None:
    migrated = await catalogue_of(migrated_url, kind)
    assert migrated == await catalogue_of(written_url, kind)
    assert migrated


async def test_each_file_is_one_function_of_its_name(migrated_url: str) -> None:
    for name in function_names():
        assert re.findall(r"^CREATE OR REPLACE FUNCTION (\w+)\(", function_sql(name), re.MULTILINE) == [
            f"anynode_{name}"
        ]
    functions = await catalogue_of(migrated_url, "functions")
    assert [name for name, _ in functions] == sorted(f"anynode_{name}" for name in function_names())


async def test_a_body_may_use_a_column_that_a_later_migration_adds(
    empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(asyncpg.UndefinedTableError):
        await load(empty_database_url, function_sql("chat"))
    await load(empty_database_url, f"BEGIN; {load_functions('chat').sql}; COMMIT")
    assert [name for name, _ in await catalogue_of(empty_database_url, "functions")] == ["anynode_chat"]
