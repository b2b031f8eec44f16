"""The digest of the page's sources, by which a build knows whether there is anything to build."""

from __future__ import annotations

from pathlib import Path

import pytest

from hatch_build import digest_of

SOURCES = {"package.json": "{}", "src/main.ts": "main", "src/parts/button.ts": "button"}


def laid_out(directory: Path, files: dict[str, str]) -> Path:
    """A directory with these files."""
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(content)
    return directory


def test_the_same_sources_have_the_same_digest_wherever_they_are(tmp_path: Path) -> None:
    one = laid_out(tmp_path / "one", SOURCES)
    other = laid_out(tmp_path / "other", dict(reversed(SOURCES.items())))
    assert digest_of(one) == digest_of(other)


@pytest.mark.parametrize(
    "changed",
    [
        {**SOURCES, "src/main.ts": "Main"},
        {**SOURCES, "src/more.ts": ""},
        {**SOURCES, ".npmrc": "fund=false"},
        {name: content for name, content in SOURCES.items() if name != "src/main.ts"},
        {"package.json": "{}", "src/Main.ts": "main", "src/parts/button.ts": "button"},
        {"package.json": "{}", "src/main.ts": "button", "src/parts/button.ts": "main"},
        {"package.json": "{}", "src/main.ts": "mainsrc/parts/button.ts\0button"},
    ],
    ids=["a content", "one more", "a hidden one", "one less", "a name", "swapped", "run together"],
)
def test_other_sources_have_another_digest(tmp_path: Path, changed: dict[str, str]) -> None:
    one = laid_out(tmp_path / "one", SOURCES)
    other = laid_out(tmp_path / "other", changed)
    assert digest_of(one) != digest_of(other)


@pytest.mark.parametrize("name", ["node_modules/react/index.js", "dist/index.html", "src/.DS_Store"])
def test_what_is_installed_or_built_is_no_source(tmp_path: Path, name: str) -> None:
    web = laid_out(tmp_path, SOURCES)
    digest = digest_of(web)
    laid_out(web, {name: "anything"})
    assert digest_of(web) == digest


def test_a_link_to_nowhere_is_no_source(tmp_path: Path) -> None:
    web = laid_out(tmp_path, SOURCES)
    digest = digest_of(web)
    (web / "src" / ".#main.ts").symlink_to("somebody@somewhere.1234")  # as Emacs locks a file
    assert digest_of(web) == digest
