"""URLs of databases: what asyncpg takes of them, and whether they name a pooler."""

from __future__ import annotations

from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

# Parameters of a URL that are meant for other clients (or for `says_pooled`), and that asyncpg would take for server
# settings.
_FOREIGN_PARAMETERS = frozenset(
    {
        *("channel_binding", "gssencmode", "tcp_user_timeout"),
        *("connect_timeout", "keepalives", "keepalives_count", "keepalives_idle", "keepalives_interval"),
        *("connection_limit", "pgbouncer", "pool_mode", "pool_timeout", "schema", "socket_timeout"),
        *("prepared_statements", "statement_cache_size"),
    }
)


class BadDatabaseUrl(ValueError):
    """The URL is not that of a Postgres database; the message says why."""


def normalise_url(url: str) -> str:
    """Return `url` in the form that asyncpg takes. Raises BadDatabaseUrl; the message never shows the password."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        # The error itself would show a part of the URL, which may be the password.
        raise BadDatabaseUrl("it cannot be read as a URL; percent-encode the user and the password") from None
    if parts.scheme not in ("postgres", "postgresql"):
        raise BadDatabaseUrl("it must begin with postgresql://")  # what it begins with may be a password
    parameters = parse_qsl(parts.query, keep_blank_values=True)
    kept = [(name, value) for name, value in parameters if name not in _FOREIGN_PARAMETERS]
    if not parts.path.strip("/") and not {"dbname", "database"} & {name for name, _ in kept}:
        raise BadDatabaseUrl("it names no database: add /name")
    return urlunsplit(("postgresql", parts.netloc, parts.path, urlencode(kept), ""))


def says_pooled(url: str) -> bool:
    """Return whether a parameter of the URL says that there is a pooler behind which prepared statements are lost."""
    parameters = dict(parse_qsl(urlsplit(url).query))
    return parameters.get("pgbouncer", "").lower() == "true" or parameters.get("statement_cache_size") == "0"
