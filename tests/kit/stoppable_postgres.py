"""A Postgres of a test's own that can be stopped, killed and started again."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped, unused-ignore]

from anynode.server.dev.embedded_postgres import EmbeddedPostgres, embedded_postgres
from tests.kit.databases import TEMPLATE, make_template
from tests.kit.harness import sql, with_database


class StoppablePostgres:
    """A Postgres whose processes may all be stopped, killed and started again."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._server: EmbeddedPostgres | None = None

    @property
    def server(self) -> EmbeddedPostgres:
        assert self._server is not None
        return self._server

    @contextmanager
    def running(self) -> Iterator[StoppablePostgres]:
        """Run it, again on the same data and socket where it has been killed."""
        with embedded_postgres(self._directory, settings={"fsync": "off", "max_connections": "200"}) as server:
            self._server = server
            try:
                yield self
            finally:
                self.resume()

    def new_database(self) -> str:
        """A fresh, migrated database."""
        name = f"test_{uuid.uuid4().hex}"
        asyncio.run(sql(self.server.url, f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}"))
        return with_database(self.server.url, name)

    def stall(self) -> None:
        """SIGSTOP all of its processes; the postmaster first, and until it stands, so that there will be no more."""
        self._stop(self._processes()[:1])
        self._stop(self._processes()[1:])

    def _stop(self, processes: Sequence[psutil.Process]) -> None:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGSTOP)
        for process in processes:
            while process.is_running() and process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
                os.sched_yield()

    def resume(self) -> None:
        """SIGCONT all of its processes."""
        for process in reversed(self._processes()):
            try:
                process.send_signal(signal.SIGCONT)
            except psutil.NoSuchProcess:
                pass

    def crash(self) -> None:
        """kill -9 of all of its processes: a backend whose postmaster has just died may still answer."""
        processes = self._processes()
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        _, alive = psutil.wait_procs(processes[1:], timeout=10)  # the postmaster waits for its parent, the launcher
        assert all(process.status() == psutil.STATUS_ZOMBIE for process in alive)

    def _processes(self) -> list[psutil.Process]:
        try:
            postmaster = psutil.Process(self.server.pid)
            return [postmaster, *postmaster.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


@contextmanager
def stoppable_postgres() -> Iterator[StoppablePostgres]:
    """Run one with a migrated template, in a directory whose path is short enough for the socket."""
    directory = Path(tempfile.mkdtemp(prefix="anynode-"))
    try:
        postgres = StoppablePostgres(directory / "postgres")
        with postgres.running():
            make_template(postgres.server.url)
            yield postgres
    finally:
        shutil.rmtree(directory, ignore_errors=True)
