"""The repository holds the project and nothing of the machines that it was made on."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
THIS = Path(__file__).relative_to(TOP)
LINES_MAX = 400
MODULES = sorted(path.relative_to(TOP) for package in ("server", "models") for path in (TOP / package).rglob("*.py"))

MACHINE_PATHS = re.compile(r"(?<![\w.~/}*-])/(?:root|tmp|home|Users|work|mnt|private|builds|opt)/[\w.-]")
REGISTRIES = re.compile(r"pypi\.org|pythonhosted|npmjs|yarnpkg|index-url|find-links|tool\.uv\.index")
CREDENTIALS = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY|\bsk-[A-Za-z0-9]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bAKIA[A-Z0-9]{16}"
)
# Notes to oneself, and references that a reader of the repository cannot follow.
LEFTOVERS = re.compile(
    r"\b(?:TODO|FIXME|XXX)\b|\b(?:this|next|later|another|own|previous) (?:issue|session|helper)s?\b"
    r"|\b(?:issue|session) #?\d|\bwork ?place\b",
    re.IGNORECASE,
)
DOCUMENTS = re.compile(r"\b[A-Z]{4,}\.md\b")
# Names that say nothing of what is inside.
EMPTY_NAMES = {"utils", "util", "helpers", "helper", "common", "manager", "service", "base", "misc"}


def tracked() -> Iterator[tuple[Path, str]]:
    """The text files of the repository, as git lists them, those not yet committed included."""
    if not (TOP / ".git").exists():
        pytest.skip("this is not a checkout")
    listed = subprocess.run(
        ["git", "-c", f"safe.directory={TOP}", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=TOP,
        check=True,
        capture_output=True,
        text=True,
    )
    names = [Path(name) for name in listed.stdout.split("\0") if name]
    assert Path("README.md") in names
    for name in names:
        if name == THIS or not (TOP / name).is_file():
            continue
        try:
            yield name, (TOP / name).read_text()
        except UnicodeDecodeError:
            continue


def findings(pattern: re.Pattern[str]) -> list[str]:
    """Where the pattern occurs."""
    return [
        f"{name}:{number}: {found[0]}"
        for name, text in tracked()
        for number, line in enumerate(text.splitlines(), 1)
        if (found := pattern.search(line))
    ]


def test_no_file_names_a_path_of_a_machine() -> None:
    assert findings(MACHINE_PATHS) == []


def test_no_file_names_a_package_registry() -> None:
    assert findings(REGISTRIES) == []


def test_no_file_holds_a_credential() -> None:
    assert findings(CREDENTIALS) == []


def test_no_file_holds_leftovers() -> None:
    assert findings(LEFTOVERS) == []


def test_every_document_that_is_named_exists() -> None:
    named = {(name, document) for name, text in tracked() for document in DOCUMENTS.findall(text)}
    assert [(name, document) for name, document in named if not (TOP / document).exists()] == []


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_modules_docstring_begins_with_a_line_that_is_a_sentence(module: Path) -> None:
    docstring = ast.get_docstring(ast.parse((TOP / module).read_text()))
    assert docstring is not None
    assert docstring.splitlines()[0].endswith(".")


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_module_is_short_enough_to_read(module: Path) -> None:
    assert len((TOP / module).read_text().splitlines()) < LINES_MAX


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_modules_name_says_what_is_in_it(module: Path) -> None:
    assert not EMPTY_NAMES & {*module.with_suffix("").parts}


@pytest.mark.parametrize("folder", ["tests", "bench", "scripts"])
def test_no_module_imports_a_test_module(folder: str) -> None:
    imported = [
        (str(path.relative_to(TOP)), name)
        for path in (TOP / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for name in imported_by(node)
        if any(part.startswith("test_") for part in name.split("."))
    ]
    assert imported == []


def imported_by(node: ast.AST) -> list[str]:
    """The dotted names that an import statement may load; of `from a import b` both `a` and `a.b`."""
    match node:
        case ast.Import(names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module, names):
            return [module or "", *(f"{module}.{alias.name}" for alias in names)]
        case _:
            return []
