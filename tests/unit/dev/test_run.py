"""What `anynode dev` tells people to type."""

from __future__ import annotations

from pathlib import Path

import pytest

from anynode.server.dev.run import anynode_command


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with a uv of its own."""
    program = tmp_path / "checkout" / ".uv" / "bin" / "uv"
    program.parent.mkdir(parents=True)
    program.touch(mode=0o755)
    return tmp_path / "checkout"


def test_a_uv_in_path_is_called_by_its_name(checkout: Path) -> None:
    programs = checkout / ".uv" / "bin"
    assert anynode_command({"UV": f"{programs}/uv", "PATH": f"/nowhere:{programs}"}, checkout) == "uv run anynode"


def test_a_uv_that_is_only_in_the_checkout_is_called_by_its_path_there(checkout: Path) -> None:
    environment = {"UV": f"{checkout}/.uv/bin/uv", "PATH": "/nowhere"}
    assert anynode_command(environment, checkout) == ".uv/bin/uv run anynode"


def test_a_uv_that_is_elsewhere_is_called_by_its_whole_path(checkout: Path, tmp_path: Path) -> None:
    environment = {"UV": f"{checkout}/.uv/bin/uv", "PATH": "/nowhere"}
    (tmp_path / "other").mkdir()
    assert anynode_command(environment, tmp_path / "other") == f"{checkout}/.uv/bin/uv run anynode"


def test_without_uv_the_command_stands_by_itself(checkout: Path) -> None:
    assert anynode_command({"PATH": "/nowhere"}, checkout) == "anynode"
