"""`DATABASE_URL` as people really have it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anynode.models.database_url import BadDatabaseUrl, normalise_url, says_pooled


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://u:p@h:5432/db", "postgresql://u:p@h:5432/db"),
        ("postgres://u:p@h/db", "postgresql://u:p@h/db"),
        ("POSTGRES://u@h/db", "postgresql://u@h/db"),
        ("postgresql://u:p%40%2F%3A%23%3F@h/db", "postgresql://u:p%40%2F%3A%23%3F@h/db"),
        ("postgresql://u:p@[::1]:5433/db", "postgresql://u:p@[::1]:5433/db"),
        ("postgres://u:p@h/db?sslmode=require", "postgresql://u:p@h/db?sslmode=require"),
        (
            "postgres://u:p@h/db?sslmode=verify-full&sslrootcert=%2Fca.pem",
            "postgresql://u:p@h/db?sslmode=verify-full&sslrootcert=%2Fca.pem",
        ),
        ("postgresql://u@h?dbname=db", "postgresql://u@h?dbname=db"),
        ("postgresql://u@/db?host=/run/postgresql", "postgresql://u@/db?host=%2Frun%2Fpostgresql"),
        ("postgresql://u@/db?host=%2Frun%2Fpostgresql", "postgresql://u@/db?host=%2Frun%2Fpostgresql"),
    ],
)
def test_a_url_is_taken_as_asyncpg_likes_it(url: str, expected: str) -> None:
    assert normalise_url(url) == expected


@pytest.mark.parametrize(
    "foreign",
    [
        *("channel_binding=require", "pgbouncer=true", "connection_limit=5", "pool_timeout=0", "schema=public"),
        *("connect_timeout=10", "statement_cache_size=0", "keepalives=1", "gssencmode=disable"),
    ],
)
def test_parameters_of_other_clients_are_dropped(foreign: str) -> None:
    url = f"postgres://u:p@h/db?{foreign}&sslmode=require"
    assert normalise_url(url) == "postgresql://u:p@h/db?sslmode=require"
    assert normalise_url(f"postgres://u:p@h/db?{foreign}") == "postgresql://u:p@h/db"


@pytest.mark.parametrize(
    ("parameters", "pooled"),
    [
        ("?pgbouncer=true", True),
        ("?pgbouncer=True&connection_limit=1", True),
        ("?sslmode=require&statement_cache_size=0", True),
        ("", False),
        ("?pgbouncer=false", False),
        ("?pgbouncer=", False),
        ("?statement_cache_size=100", False),
        ("?statement_cache_size=", False),
        ("#?pgbouncer=true", False),
    ],
)
def test_a_url_may_say_that_there_is_a_pooler(parameters: str, pooled: bool) -> None:
    assert says_pooled(f"postgres://u:p@h/db{parameters}") is pooled


@pytest.mark.parametrize(
    "url", ["mysql://u:secret@h/db", "http://h/db", "sqlite:///db", "postgresql+asyncpg://u:secret@h/db", "h/db", ""]
)
def test_a_foreign_scheme_is_refused(url: str) -> None:
    with pytest.raises(BadDatabaseUrl, match="must begin with postgresql://"):
        normalise_url(url)


@pytest.mark.parametrize("url", ["postgresql://h", "postgresql://u:secret@h/", "postgres://h?sslmode=require"])
def test_a_url_that_names_no_database_is_refused(url: str) -> None:
    with pytest.raises(BadDatabaseUrl, match="names no database"):
        normalise_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:hunter2@h:port/db",
        "postgresql://u:hunter2@h:99999/db",
        "postgresql://u:hunter2@[::1/db",
        "postgresql://u:hunter2/x@h/db",
        "postgresql://u:hunter2#x@h/db",
        "postgresql://u:hunter2?x@h/db",
        "postgresql://u:[hunter2]@h/db",
        "postgresql://u:hunter2\u2100@h/db",
        "mysql://u:hunter2@h/db",
        "postgresql://u:hunter2@h",
    ],
)
def test_a_refusal_never_shows_the_password(url: str) -> None:
    with pytest.raises(BadDatabaseUrl) as refused:
        normalise_url(url)
    assert "hunter2" not in str(refused.value)


@given(st.text() | st.text().map("postgresql://".__add__) | st.text().map("postgresql://u:{}@h/db".format))
def test_any_text_is_refused_or_taken_and_then_stays_as_it_is(url: str) -> None:
    try:
        taken = normalise_url(url)
    except BadDatabaseUrl:
        return
    assert taken.startswith("postgresql:")
    assert normalise_url(taken) == taken
