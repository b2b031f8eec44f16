"""Imports what a setting names as `package.module:attribute`, also from the current folder."""

from __future__ import annotations

import importlib
import sys
import sysconfig
from typing import Any

from anynode.server.errors import ConfigurationError


def import_named(setting: str, name: str, *, forms: str = "`package.module:attribute`") -> Any:
    """Import and return what `name` names; `forms` says what the setting may be. Raises ConfigurationError with one
    line."""
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ConfigurationError(f"{setting} must be {forms}, not {name!r}")
    _add_current_folder()
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # a module may raise anything
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigurationError(f"{setting}={name}: module {module_name!r} cannot be imported: {cause}") from error
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise ConfigurationError(f"{setting}={name}: module {module_name!r} has no {attribute!r}") from None
    return found


def _add_current_folder() -> None:
    """Put the current folder on Python's path, unless it is there: behind the standard library, before what is
    installed.

    Anynode and what it depends on are loaded already, so a `click.py` or `anynode.py` in the folder replaces nothing of
    ours, and a `json.py` nothing of the standard library. But the user's own `agents.py` and `models.py` come before
    installed packages of these names, as for any script of theirs.
    """
    if "" in sys.path:  # as with `python -m`
        return
    importlib.import_module("aiohttp")  # which the agent `openai` and JWT_JWKS_URL would load only later
    standard = sysconfig.get_path("stdlib")
    ends = [index for index, entry in enumerate(sys.path, 1) if entry in (standard, f"{standard}/lib-dynload")]
    sys.path.insert(max(ends, default=0), "")
