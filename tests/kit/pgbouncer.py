"""A real PgBouncer in transaction mode before the tests' Postgres."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import asyncpg

from anynode.server.dev.unprivileged import as_owner, give_to_nobody
from tests.kit.harness import free_port, sql
from tests.kit.programs import program

CONFIGURATION = """
[databases]
* = {target}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = {pool_size}
max_client_conn = 500
server_login_retry = 1
"""


class PgBouncer:
    """One on a port of its own; it may be killed and started again."""

    def __init__(self, directory: Path, port: int) -> None:
        self._directory = directory
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None

    def url(self, database_url: str) -> str:
        """Where a database of the server behind it is found through it."""
        parts = urlsplit(database_url)
        return f"postgresql://{parts.username}@127.0.0.1:{self._port}{parts.path}"

    def start(self) -> None:
        """Run it; returns when it listens."""
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*as_owner(self._directory), _program(), self._directory / "pgbouncer.ini"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + 20
        while True:
            try:
                asyncio.run(sql(f"postgresql://nobody@127.0.0.1:{self._port}/pgbouncer", ""))
            except OSError:
                assert self._process.poll() is None, (self._directory / "log").read_text()
                assert time.monotonic() < deadline, "PgBouncer does not listen"
                time.sleep(0.02)
            except asyncpg.PostgresError:
                return  # it refuses, but it is there

    def kill(self) -> None:
        """kill -9."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()


@contextmanager
def running_pgbouncer(postgres_url: str, *, pool_size: int) -> Iterator[PgBouncer]:
    """Run a PgBouncer that opens at most `pool_size` connections to a database. Without the program see `programs`."""
    _program()
    directory = Path(tempfile.mkdtemp(prefix="anynode-"))
    try:
        port = free_port()
        configuration = CONFIGURATION.format(target=_target(postgres_url), port=port, pool_size=pool_size)
        (directory / "pgbouncer.ini").write_text(configuration)
        give_to_nobody(directory)
        pgbouncer = PgBouncer(directory, port)
        pgbouncer.start()
        try:
            yield pgbouncer
        finally:
            pgbouncer.kill()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _program() -> str:
    return program("pgbouncer", install="apt-get install pgbouncer")


def _target(postgres_url: str) -> str:
    """The server, in the words of PgBouncer's configuration."""
    parts = urlsplit(postgres_url)
    host = parts.hostname or parse_qs(parts.query)["host"][0]
    words = {"host": host, "port": parts.port or 5432, "user": unquote(parts.username or "")}
    if parts.password:
        words["password"] = unquote(parts.password)
    return " ".join(f"{name}='{value}'" for name, value in words.items())
