"""What `anynode dev` tells people to type."""

from __future__ import annotations

from pathlib import Path

from anynode.server.dev.run import anynode_command


def test_a_program_in_the_checkout_is_called_by_its_path_there() -> None:
    assert anynode_command(Path("/checkout/.venv/bin/python"), Path("/checkout")) == ".venv/bin/anynode"


def test_a_program_that_was_installed_elsewhere_is_called_by_its_name() -> None:
    assert anynode_command(Path("/usr/local/bin/python3"), Path("/checkout")) == "anynode"
