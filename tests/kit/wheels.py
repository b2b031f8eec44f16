"""Packages built from this repository, and environments that they are installed into."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tests.kit.programs import give_up_without, program

TOP: Final = Path(__file__).parents[2]
# What uv and pip say where they do not come through to their index.
UNREACHABLE: Final = re.compile(
    "error sending request|dns error|tcp connect|failed to fetch|timed out|failed to establish a new connection",
    re.IGNORECASE,
)
INSTALL_SECONDS_MAX: Final = 180.0


def package_around(root: Path) -> Path:
    """Copy into `root` all that the package is made of, except web/. Returns `root`."""
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(TOP / name, root)
    shutil.rmtree(root / "anynode", ignore_errors=True)
    shutil.copytree(TOP / "anynode", root / "anynode", symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("server", "models"):
        shutil.copytree(TOP / name, root / name, ignore=shutil.ignore_patterns("page", "__pycache__"))
    return root


def uv(*arguments: str | Path, environment: Mapping[str, str] | None = None) -> None:
    """Run uv. Where the index of packages cannot be reached the test is skipped, except in CI."""
    path = os.environ.get("UV") or program("uv", install="uv run --dev pytest")  # `uv run` says where it is itself
    _run(path, *arguments, environment={**os.environ, **(environment or {})})


def _run(*command: str | Path, environment: Mapping[str, str], directory: Path | None = None) -> None:
    done = subprocess.run(
        command,
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=INSTALL_SECONDS_MAX,
        check=False,
    )
    if done.returncode != 0 and UNREACHABLE.search(done.stdout):
        give_up_without("the packages of an index", shlex.join(map(str, command)), done.stdout[-300:])
    assert done.returncode == 0, done.stdout


def uv_build(source: Path, *options: str, to: Path, is_skipped: bool = False) -> Path:
    """Build a wheel, or what else is said; returns it. `is_skipped`: without a page."""
    skip = {"ANYNODE_NO_PAGE": "1" if is_skipped else "0"}
    kind = options or ("--wheel",)
    uv("build", *kind, "--python", sys.executable, "--out-dir", to, source, environment=skip)
    (built,) = to.glob("*.whl" if not options else "*.tar.gz")
    return built


def installed(wheel: Path, directory: Path) -> Path:
    """Make an environment with a wheel and the locked versions of its dependencies; returns its folder of programs."""
    programs = directory / "bin"
    uv("venv", "--quiet", "--python", sys.executable, directory)
    uv("pip", "install", "--python", programs / "python", "--constraint", TOP / "requirements-dev.txt", wheel)
    return programs


def deployed(checkout: Path, directory: Path) -> Path:
    """Make an environment as a platform does, from a checkout's requirements.txt alone; returns its folder of programs.

    The chat page is not built: the package takes the one that is in the checkout, or has none. Modules are compiled
    only when they are imported. uv makes the environment and puts pip into it: `python -m venv` cannot do that where
    the system's Python comes without ensurepip.
    """
    programs = directory / "bin"
    uv("venv", "--quiet", "--seed", "--python", sys.executable, directory)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    command = (programs / "python", "-m", "pip", "install", "--no-compile", "-r", "requirements.txt")
    _run(*command, environment={**environment, "ANYNODE_NO_PAGE": "1"}, directory=checkout)
    return programs
