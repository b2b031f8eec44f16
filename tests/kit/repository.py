"""The files of the repository, for tests that hold them to rules or to each other."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

import pytest

TOP: Final = Path(__file__).parents[2]


@cache
def listed() -> tuple[Path, ...]:
    """Return the files that git lists, sorted, relative to the top; new files count before they are committed."""
    return tuple(name for name in _listed_by_git() if (TOP / name).is_file())


def copied_to(directory: Path) -> Path:
    """Copy what a clone would have, changes that are not committed included, into a directory; return the directory."""
    for name in _listed_by_git():
        if (TOP / name).is_file() or (TOP / name).is_symlink():  # the two links of anynode/
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(TOP / name, directory / name, follow_symlinks=False)
    return directory


def _listed_by_git() -> list[Path]:
    if not (TOP / ".git").exists():
        pytest.skip("this is not a checkout")
    command = ["git", "-c", f"safe.directory={TOP}", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    output = subprocess.run(command, cwd=TOP, check=True, capture_output=True, text=True).stdout
    names = sorted({Path(name) for name in output.split("\0") if name})
    assert Path("README.md") in names
    return names


def texts() -> Iterator[tuple[Path, str]]:
    """Yield the name and the text of each file that is text."""
    for name in listed():
        try:
            yield name, (TOP / name).read_text()
        except UnicodeDecodeError:
            continue
