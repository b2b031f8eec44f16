"""The files of the repository, for tests that hold them to rules or to each other."""

from __future__ import annotations

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
    if not (TOP / ".git").exists():
        pytest.skip("this is not a checkout")
    command = ["git", "-c", f"safe.directory={TOP}", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    output = subprocess.run(command, cwd=TOP, check=True, capture_output=True, text=True).stdout
    names = sorted({Path(name) for name in output.split("\0") if name})
    assert Path("README.md") in names
    return tuple(name for name in names if (TOP / name).is_file())


def texts() -> Iterator[tuple[Path, str]]:
    """Yield the name and the text of each file that is text."""
    for name in listed():
        try:
            yield name, (TOP / name).read_text()
        except UnicodeDecodeError:
            continue
