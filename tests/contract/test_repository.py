"""Rules for the files of the repository: no credentials, and modules that can be read in one go."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.kit.repository import TOP, texts

LINES_MAX = 400
MODULES = sorted(path.relative_to(TOP) for package in ("server", "models") for path in (TOP / package).rglob("*.py"))

CREDENTIALS = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY|\bsk-[A-Za-z0-9]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bAKIA[A-Z0-9]{16}"
)
DOCUMENTS = re.compile(r"\b[A-Z]{4,}\.md\b")
# Names that say nothing of what is inside.
EMPTY_NAMES = {"utils", "util", "helpers", "helper", "common", "manager", "service", "base", "misc"}


def test_no_file_holds_a_credential() -> None:
    held = [
        f"{name}:{number}"
        for name, text in texts()
        for number, line in enumerate(text.splitlines(), 1)
        if CREDENTIALS.search(line)
    ]
    assert held == []


def test_every_document_that_is_named_exists() -> None:
    named = {(name, document) for name, text in texts() for document in DOCUMENTS.findall(text)}
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


@pytest.mark.parametrize("package", ["engine", "transport", "protocol"])
def test_each_module_has_a_unit_test_of_its_name(package: str) -> None:
    modules = {path.stem for path in (TOP / "server" / package).glob("*.py")} - {"__init__"}
    tests = {path.stem.removeprefix("test_") for path in (TOP / "tests" / "unit" / package).glob("test_*.py")}
    assert modules - tests == set()


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


WORKFLOW = (TOP / ".github" / "workflows" / "check.yml").read_text()


def test_the_workflow_names_the_version_of_each_action_and_program() -> None:
    actions = re.findall(r"uses: (\S+)", WORKFLOW)
    assert len(actions) >= 2
    assert [action for action in actions if not re.fullmatch(r"[\w-]+/[\w-]+@v\d+", action)] == []
    installed = re.findall(r"pip install (.+)", WORKFLOW)
    assert [each for line in installed for each in line.split() if "==" not in each] == []


def test_the_workflow_looks_for_known_flaws_in_all_that_is_locked_and_lists_it() -> None:
    for command in ("pip-audit .*production.txt", "pip-audit .*requirements-dev.txt", "npm .*audit"):
        assert re.search(f"run: {command}$", WORKFLOW, re.MULTILINE), command
    assert "cyclonedx-py requirements" in WORKFLOW
    assert "--sbom-format cyclonedx" in WORKFLOW
    assert re.search(r"^permissions:\n  contents: read$", WORKFLOW, re.MULTILINE)
