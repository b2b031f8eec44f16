"""Finds what a setting names as `package.module:attribute`."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from anynode.server.errors import ConfigurationError


def import_named(setting: str, name: str, *, forms: str = "`package.module:attribute`") -> Any:
    """What `name` names; `forms` says what the setting may be. Raises ConfigurationError with one line."""
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ConfigurationError(f"{setting} must be {forms}, not {name!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the current directory, as with `python -m`; an installed command leaves it out
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
