"""Copies the versions of requirements.txt into `[tool.uv] constraint-dependencies` of pyproject.toml; `make lock`.

So `uv run` and `uv sync` resolve to the same versions everywhere, without a lock file that would record from which
registry they came. `--clear` takes the constraints out, for an upgrade.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
CONSTRAINTS = re.compile(r"^constraint-dependencies = \[\n(?:    .*\n)*\]\n", re.MULTILINE)
TABLE = re.compile(r"^\[tool\.uv\]\n", re.MULTILINE)
COMMENT = "# The versions of requirements.txt, written by `make lock`.\n"


def pins(requirements: str) -> list[str]:
    """`name==version ; marker` of every requirement, without its hashes."""
    found = []
    for line in requirements.splitlines():
        if line and not line.startswith((" ", "#")):
            pin = line.removesuffix("\\").strip()
            if not re.match(r"[A-Za-z0-9._-]+==[^\s;@]+( ; .+)?$", pin):
                raise SystemExit(f"requirements.txt: not a pinned version: {pin}")
            found.append(pin)
    return found


def constrained(project: str, constraints: list[str]) -> str:
    """The text of pyproject.toml with exactly these constraints."""
    listed = "".join(f'    "{constraint}",\n' for constraint in constraints)
    block = f"constraint-dependencies = [\n{listed}]\n"
    if CONSTRAINTS.search(project):
        return CONSTRAINTS.sub(lambda _: block, project)
    if TABLE.search(project):
        return TABLE.sub(lambda table: table[0] + COMMENT + block, project)
    return f"{project.rstrip()}\n\n[tool.uv]\n{COMMENT}{block}"


def main(arguments: list[str]) -> None:
    """Rewrite pyproject.toml."""
    file = TOP / "pyproject.toml"
    constraints = [] if arguments == ["--clear"] else pins((TOP / "requirements.txt").read_text())
    file.write_text(constrained(file.read_text(), constraints))


if __name__ == "__main__":
    main(sys.argv[1:])
