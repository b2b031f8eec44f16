"""What a setting names is found in the current folder, which replaces nothing of Python's or ours."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from anynode.server.agents.import_by_name import import_named
from anynode.server.errors import ConfigurationError

NAMES = ("my_place", "colorsys", "no_such_place")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, which is not on the path, as for the installed command."""
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return folder


def test_a_module_of_the_current_folder_is_found() -> None:
    Path("my_place.py").write_text("place = 'here'\n")
    assert import_named("AGENT", "my_place:place") == "here"


def test_the_current_folder_comes_before_an_installed_package_of_the_same_name(tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    installed.mkdir()
    (installed / "my_place.py").write_text("place = 'installed'\n")
    sys.path.append(str(installed))
    Path("my_place.py").write_text("place = 'here'\n")
    assert import_named("AGENT", "my_place:place") == "here"


def test_a_file_of_the_current_folder_replaces_no_module_of_the_standard_library(folder: Path) -> None:
    Path("colorsys.py").write_text("raise RuntimeError('replaced')\n")
    Path("my_place.py").write_text("from colorsys import rgb_to_hsv as place\n")
    assert import_named("AGENT", "my_place:place")(0, 0, 0) == (0.0, 0.0, 0)
    assert not str(importlib.import_module("colorsys").__file__).startswith(str(folder))


def test_the_current_folder_is_put_on_the_path_once() -> None:
    Path("my_place.py").write_text("place = 'here'\n")
    for _ in range(2):
        import_named("AGENT", "my_place:place")
    assert sys.path.count("") == 1


def test_a_path_without_the_standard_library_is_searched_behind_the_current_folder() -> None:
    sys.path[:] = [entry for entry in sys.path if "site-packages" in entry]
    with pytest.raises(ConfigurationError, match="No module named 'no_such_place'"):
        import_named("AGENT", "no_such_place:place")
    assert sys.path[0] == ""
