"""Fixtures: one Postgres for the whole run, a fresh migrated database, and a node."""

from __future__ import annotations

import shutil
import signal
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from anynode.server.dev.embedded_postgres import embedded_postgres
from tests.kit.databases import fresh_database, make_template
from tests.kit.examples import register_profiles
from tests.kit.harness import NodeProcess, running_node
from tests.kit.programs import summary_of

register_profiles()


def pytest_configure() -> None:
    """Let a SIGTERM end the run as Ctrl-C does, so that fixtures stop what they started."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--postgres-url`: run on a server that is there, as its superuser, instead of on the bundled one."""
    parser.addoption(
        "--postgres-url",
        help="a superuser's URL of the PostgreSQL server to run the tests on; those that do not use it are left out",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the slow tests, so that none is left to one process at the end.

    With `--postgres-url`, leave out the tests that do not use that server: they would run as they do without it.
    """
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if config.getoption("--postgres-url") is not None:
        left_out = [item for item in items if "postgres_url" not in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what tests were skipped for want of, and the command that installs it, a line each."""
    skips = terminalreporter.getreports("skipped")
    for line in summary_of(skip.longrepr[2] for skip in skips if isinstance(skip.longrepr, tuple)):
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def postgres_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """A Postgres with a migrated template database."""
    given: str | None = request.config.getoption("--postgres-url")
    if given is not None:
        make_template(given)
        yield given
        return
    directory = Path(tempfile.mkdtemp(prefix="anynode-"))
    # A crash of the machine is not among the faults that tests inject, so the disk need not be waited for.
    settings = {"fsync": "off", "full_page_writes": "off", "max_connections": "300"}
    try:
        with embedded_postgres(directory / "postgres", settings=settings) as postgres:
            make_template(postgres.url)
            yield postgres.url
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def database_url(postgres_url: str) -> Iterator[str]:
    """The test's own database."""
    with fresh_database(postgres_url) as url:
        yield url


@pytest.fixture(scope="module")
def module_database_url(postgres_url: str) -> Iterator[str]:
    """A database that the tests of a module share, as users of their own."""
    with fresh_database(postgres_url) as url:
        yield url


StartNode = Callable[..., NodeProcess]


@pytest.fixture
def start_node(database_url: str, tmp_path: Path) -> Iterator[StartNode]:
    """Starts nodes on the test's database: `start_node(LEASE_SECONDS="2")`; they are stopped at the end."""
    with ExitStack() as stack:

        def start(url: str | None = None, **environment: str) -> NodeProcess:
            return stack.enter_context(running_node(url or database_url, tmp_path, environment))

        yield start


@pytest.fixture(scope="module")
def shared_node(module_database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A node with default settings and a fast echo agent, shared by a module whose tests use users of their own."""
    with running_node(module_database_url, tmp_path_factory.mktemp("node")) as node:
        yield node


@pytest.fixture
def user() -> str:
    """A user that nobody else is."""
    return f"user-{uuid.uuid4().hex[:12]}"
