"""ARCHITECTURE.md and the documents beside it name what there is: every package, and no path or name that is gone."""

from __future__ import annotations

import re

import pytest

from anynode.models.queries import statements
from tests.kit.prose import markdown_prose
from tests.kit.repository import TOP, listed

ARCHITECTURE = (TOP / "ARCHITECTURE.md").read_text()
INVARIANTS = (TOP / "docs" / "invariants.md").read_text()
PAGE_LINES_MAX = 90  # what can be read on one page
# Folders that every project has, and that hold no part of ours.
UNNAMED = {".ci", ".github"}


def rows(text: str) -> list[list[str]]:
    """The cells of all tables of a text, without their heads."""
    parts = [re.findall(r"^\|.+", table, re.M)[2:] for table in re.findall(r"(?:^\|.+\n)+", text, re.M)]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for part in parts for line in part]


def mapped() -> list[str]:
    """The paths of the map's first column."""
    section = ARCHITECTURE.split("\n## Map\n")[1].split("\n## ")[0]
    return [path for row in rows(section) for path in re.findall(r"`([^`]+)`", row[0])]


def in_the_tree() -> set[str]:
    """What the map must name: folders of the top, packages of server, modules of server that are in no package, and
    all that is in models."""
    files = [name for name in listed() if len(name.parts) > 1]
    tops = {f"{name.parts[0]}/" for name in files if name.parts[0] not in UNNAMED} - {"server/"}
    packages = {f"{name.parent}/" for name in files if name.parts[0] == "server" and name.name == "__init__.py"}
    modules = {str(name) for name in files if name.parts[:1] == ("server",) and len(name.parts) == 2}
    database = {"/".join(name.parts[:2]) + "/" * (len(name.parts) > 2) for name in files if name.parts[0] == "models"}
    kept = {name for name in modules | database if name.endswith((".py", ".sql", "/")) and "__init__" not in name}
    return (tops | packages | kept) - {"server/"}


def test_the_map_names_each_package_and_module_once_and_nothing_else() -> None:
    assert sorted(mapped()) == sorted(in_the_tree())


def test_the_architecture_is_one_page() -> None:
    assert len(ARCHITECTURE.splitlines()) <= PAGE_LINES_MAX


@pytest.mark.parametrize("name", ["ARCHITECTURE.md", "docs/design.md", "docs/invariants.md"])
def test_every_path_that_is_named_exists(name: str) -> None:
    text = (TOP / name).read_text()
    lines = [line for _, line in markdown_prose(text)] + re.findall(r"^\|.+", text, re.M)
    tops = {f"{path.parts[0]}/" for path in listed() if len(path.parts) > 1}
    named = {path for line in lines for path in re.findall(r"`([\w.-]+/[\w./*-]*)`", line)}
    here = {path for path in named if f"{path.partition('/')[0]}/" in tops}
    assert here
    assert [path for path in sorted(here) if not (TOP / path).exists()] == []


def definition(name: str) -> str:
    """A pattern for the place where a name is made: a function, a class, a variable, an argument or a key."""
    name = re.escape(name)
    return rf"(?:\b(?:def|class) |\bself\.){name}\b|\b{name}\s*[:=]|[\"']{name}[\"']"


def test_every_name_of_an_invariant_is_defined_in_the_file_beside_it() -> None:
    """Names between two semicolons belong to the files that stand there; a name of SQL may stand alone."""
    sql = "".join(path.read_text() for path in (TOP / "models").rglob("*") if path.suffix in (".py", ".sql"))
    of_sql = {*statements(), *re.findall(r"(?:FUNCTION|INDEX|CONSTRAINT|TABLE)\s+(\w+)", sql)}
    checked = 0
    for invariant, places in rows(INVARIANTS):
        for place in re.split(r"[;:] ", places):
            named = re.findall(r"`([^`]+)`", place)
            files = [name for name in named if (TOP / name).is_file()]
            text = "".join((TOP / name).read_text() for name in files)
            for name in set(named) - set(files) - of_sql:
                for part in name.split("."):
                    found = re.search(definition(part), text) if files else re.search(rf"\b{re.escape(part)}\b", sql)
                    assert found, f"{invariant} {name}"
            checked += bool(named)
    assert checked > len(rows(INVARIANTS))


@pytest.mark.parametrize("name", ["ARCHITECTURE.md", "docs/design.md"])
def test_every_class_and_function_of_sql_that_is_named_exists(name: str) -> None:
    text = (TOP / name).read_text()
    source = "".join(path.read_text() for part in ("server", "models") for path in (TOP / part).rglob("*.py"))
    sql = source + "".join(path.read_text() for path in (TOP / "models").rglob("*.sql"))
    for qualified in re.findall(r"`((?:[A-Z][a-z]+)+(?:\.\w+)?)`", text):
        class_name, _, method = qualified.partition(".")
        assert re.search(rf"^class {class_name}\b", source, re.M), qualified
        assert re.search(rf"def {method}\b", source), qualified
    for function in re.findall(r"`(anynode_\w+)`", text):
        assert re.search(rf"FUNCTION {function}\b", sql), function
