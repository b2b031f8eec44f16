"""Finishes what `make lock` exports: the project in requirements.txt, and constraints in pyproject.toml.

- requirements.txt is what production installs. Its last line is the project itself, so that `pip install -r
  requirements.txt` brings the command too. pip takes no folder beside hashes, so this file has none.
- `[tool.uv] constraint-dependencies` repeats the versions of requirements-dev.txt, which has all of them. So `uv run`
  and `uv sync` resolve to the same versions everywhere, without a lock file that would record from which registry they
  came. `--clear` takes the constraints out, for an upgrade.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
PROJECT = "."  # a path, relative to the folder in which pip runs
CONSTRAINTS = re.compile(r"^constraint-dependencies = \[\n(?:    .*\n)*\]\n", re.MULTILINE)
TABLE = re.compile(r"^\[tool\.uv\]\n", re.MULTILINE)
COMMENT = "# The versions of requirements-dev.txt, written by `make lock`.\n"
PRODUCTION_COMMENT = """\
# What production installs, at the top of a checkout: pip install -r requirements.txt
# Written by `make lock`. The last line is Anynode itself; pip allows no hashes beside a folder.
"""


def pins(requirements: str) -> list[str]:
    """Return `name==version ; marker` of every requirement, without its hashes."""
    found = []
    for line in requirements.splitlines():
        if line and not line.startswith((" ", "#")):
            pin = line.removesuffix("\\").strip()
            if not re.match(r"[A-Za-z0-9._-]+==[^\s;@]+( ; .+)?$", pin):
                raise SystemExit(f"not a pinned version: {pin}")
            found.append(pin)
    return found


def with_project(exported: str) -> str:
    """Return the text of requirements.txt for what uv has exported: its pins, and the project."""
    listed = "".join(f"{pin}\n" for pin in pins(exported))
    return f"{PRODUCTION_COMMENT}{listed}{PROJECT}\n"


def constrained(project: str, constraints: list[str]) -> str:
    """Return the text of pyproject.toml with exactly these constraints."""
    listed = "".join(f'    "{constraint}",\n' for constraint in constraints)
    block = f"constraint-dependencies = [\n{listed}]\n"
    if CONSTRAINTS.search(project):
        return CONSTRAINTS.sub(lambda _: block, project)
    if TABLE.search(project):
        return TABLE.sub(lambda table: table[0] + COMMENT + block, project)
    return f"{project.rstrip()}\n\n[tool.uv]\n{COMMENT}{block}"


def main(arguments: list[str]) -> None:
    """Rewrite requirements.txt and pyproject.toml."""
    file = TOP / "pyproject.toml"
    if arguments == ["--clear"]:
        file.write_text(constrained(file.read_text(), []))
        return
    production = TOP / "requirements.txt"
    production.write_text(with_project(production.read_text()))
    file.write_text(constrained(file.read_text(), pins((TOP / "requirements-dev.txt").read_text())))


if __name__ == "__main__":
    main(sys.argv[1:])
