"""Fixtures that many system tests share; a module that needs another one has its own under the same name."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
import pytest_asyncio

from tests.agents.scripted import Strings
from tests.kit.ai_sdk import new_id
from tests.kit.browser import Browser, running_browser
from tests.kit.dev import processes_that_mention
from tests.kit.gated_turn import Gated
from tests.kit.harness import NodeProcess, running_node


@pytest.fixture(scope="module")
def strings(tmp_path_factory: pytest.TempPathFactory) -> Strings:
    """What holds scripted answers up, for all tests of a module."""
    return Strings(tmp_path_factory.mktemp("strings"))


@pytest.fixture
def gate(strings: Strings) -> str:
    """The name of a gate that nobody else has."""
    return strings.name()


@pytest.fixture
def chat() -> str:
    """A client's own id of a chat that is not there yet."""
    return new_id()


@pytest.fixture(scope="module")
def nodes(
    module_database_url: str, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Sequence[NodeProcess]]:
    """Two nodes on one database, with the module's `environment`."""
    directory = tmp_path_factory.mktemp("nodes")
    with ExitStack() as stack:
        yield [stack.enter_context(running_node(module_database_url, directory, environment)) for _ in range(2)]


@pytest.fixture(scope="module")
def node(module_database_url: str, tmp_path_factory: pytest.TempPathFactory, strings: Strings) -> Iterator[NodeProcess]:
    """A node whose agent does what the question says."""
    with running_node(module_database_url, tmp_path_factory.mktemp("node"), strings.environment) as node:
        yield node


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    """A browser for all tests of a module, which run in the module's event loop."""
    async with running_browser() as browser:
        yield browser


@pytest.fixture
def gated(strings: Strings) -> Gated:
    """A turn whose events come one at a time."""
    return Gated(strings)


@pytest.fixture
def data_directory() -> Iterator[Path]:
    """A data directory for `anynode dev`; whatever still runs of it is killed at the end."""
    directory = Path(tempfile.mkdtemp(prefix="anynode-"))
    yield directory / "data"
    for process in processes_that_mention(directory):
        process.kill()
    shutil.rmtree(directory, ignore_errors=True)
