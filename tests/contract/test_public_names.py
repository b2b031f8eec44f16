"""What `anynode` exports: it exists, is described and documented, and is all that the documents import."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from textwrap import dedent
from typing import Final

import pytest

import anynode
from anynode.server.agents import agent

TOP: Final = Path(__file__).parents[2]
DOCUMENTS: Final = ("README.md", "PROTOCOL.md", *(f"docs/{path.name}" for path in (TOP / "docs").glob("*.md")))
EXAMPLES: Final = tuple(str(path.relative_to(TOP)) for path in (TOP / "examples").rglob("*.py"))
# The models are public too: for reports, as docs/store.md shows.
TABLES: Final = {"anynode.models.tables", "anynode.models.tables.Conversation"}
# How a docstring begins that cannot be read without the code beside it.
DEPENDENT: Final = re.compile(
    r"(The same|As |It |Its |That |This |What |Who|Whether |With |Of |In |To |For |On |At |By )"
)


def python_of(name: str) -> list[str]:
    """The Python code of an example, or in a document."""
    text = (TOP / name).read_text()
    return (
        [text] if name.endswith(".py") else re.findall(r"^```(?:python|py)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    )


def imported(code: str) -> set[str]:
    """The modules that some code imports, and `anynode.NAME` for each name that it imports from `anynode`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(dedent(code))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "anynode":
            found.update(f"anynode.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or ".")
    return found


def own(modules: set[str]) -> set[str]:
    """Return the modules that are ours, under either of their names."""
    return {
        module for module in modules if module.partition(".")[0] in ("anynode", "server", "models", "bench", "tests")
    }


def alias_docstring(name: str) -> str:
    """The string below the definition of a type alias, which editors show."""
    body = ast.parse(inspect.getsource(agent)).body
    for defined, below in pairwise(body):
        if isinstance(defined, ast.AnnAssign) and isinstance(defined.target, ast.Name) and defined.target.id == name:
            assert isinstance(below, ast.Expr)
            assert isinstance(below.value, ast.Constant)
            return str(below.value.value)
    raise AssertionError(f"{name} is no alias in agent.py")


def docstring(name: str) -> str:
    """What an editor shows about a public name."""
    value = getattr(anynode, name)
    return (
        (inspect.getdoc(value) or "") if inspect.isclass(value) or inspect.isroutine(value) else alias_docstring(name)
    )


@pytest.mark.parametrize("name", anynode.__all__)
def test_a_public_name_exists_and_is_described_by_a_sentence_that_stands_alone(name: str) -> None:
    said = docstring(name)
    assert re.match(r"[A-Z].*[.]", said, re.DOTALL), said
    assert not DEPENDENT.match(said), said
    assert name in dir(anynode)


@pytest.mark.parametrize("name", anynode.__all__)
def test_a_public_name_is_in_the_documents(name: str) -> None:
    text = "\n".join((TOP / document).read_text() for document in DOCUMENTS)
    spans = re.findall(r"`[^`\n]+`", text) + [code for document in DOCUMENTS for code in python_of(document)]
    assert any(re.search(rf"\b{name}\b", span) for span in spans)


def test_the_public_names_are_sorted_and_no_other_name_is_there() -> None:
    assert anynode.__all__ == sorted(set(anynode.__all__))
    with pytest.raises(AttributeError, match="has no attribute 'Journal'"):
        anynode.Journal  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("name", [*DOCUMENTS, *EXAMPLES, "examples/README.md"])
def test_documents_and_examples_import_only_what_is_public(name: str) -> None:
    for code in python_of(name):
        allowed = {f"anynode.{public}" for public in anynode.__all__} | TABLES
        assert own(imported(code)) <= allowed
    assert not re.search(r"\banynode\.(server|models(?!\.tables))\b", (TOP / name).read_text())


def test_the_readme_shows_agents_tools_and_the_client_by_their_public_names() -> None:
    """Otherwise the test above would prove nothing of them."""
    shown = set().union(*(imported(code) for code in python_of("README.md")))
    assert {"anynode.Turn", "anynode.ToolContext", "anynode.from_run_agent", "anynode.Client"} <= shown


def loaded_by(code: str) -> set[str]:
    """The modules that a process has loaded when it has run some code."""
    run = [sys.executable, "-P", "-c", f"{code}\nimport sys; print(*sys.modules)"]
    return set(subprocess.run(run, capture_output=True, text=True, check=True).stdout.split())


def test_importing_anynode_loads_nothing_else_of_it_and_no_dependency() -> None:
    loaded = loaded_by("import anynode")
    assert {name for name in loaded if name.startswith("anynode")} == {"anynode"}
    assert not loaded & {"asyncio", "msgspec", "starlette", "websockets"}


def test_an_agent_and_its_tools_load_no_server_and_no_database() -> None:
    names = ", ".join(
        sorted(set(anynode.__all__) - {"ChatAnswer", "Client", "GivenUp", "Refused", "Store", "from_pydantic_ai"})
    )
    loaded = loaded_by(f"from anynode import {names}")
    assert "msgspec" in loaded
    assert not loaded & {"starlette", "uvicorn", "websockets", "aiohttp", "asyncpg", "tortoise", "pydantic_ai", "click"}


def test_the_client_loads_no_server_and_no_database() -> None:
    loaded = loaded_by("from anynode import Client, GivenUp, Refused")
    assert "websockets" in loaded
    assert not loaded & {"starlette", "uvicorn", "aiohttp", "asyncpg", "tortoise", "click"}


def test_without_pydantic_ai_its_adapter_says_what_to_install_and_the_other_names_work() -> None:
    code = """
import sys
sys.modules["pydantic_ai"] = None
from anynode import Client, Turn, from_run_agent
try:
    from anynode import from_pydantic_ai
except Exception as error:
    assert 'pip install --upgrade "anynode[pydantic-ai]"' in str(error)
else:
    raise AssertionError("it was found")
"""
    assert "anynode.server.agents.run_agent" in loaded_by(code)
