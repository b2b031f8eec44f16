"""Strict decoding of JSON: what could be read in two ways, or could not be stored, is refused. No I/O."""

from __future__ import annotations

import json
import math
import re
from typing import Any, Final, NoReturn

from anynode.models.text import is_storable
from anynode.server.errors import InvalidFrame

# A text that can be stored, without one of these escapes, holds no string that cannot: then its strings need not be
# looked at one by one, which for a million of them would take most of the time.
_MAYBE_NOT_STORABLE: Final = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")


def strict_json(text: str, noun: str) -> Any:
    """Decode a JSON text strictly: no duplicate key, no NaN, no text that Postgres cannot store. Raises InvalidFrame,
    whose message begins with the noun."""
    is_checked = not is_storable(text) or _MAYBE_NOT_STORABLE.search(text) is not None
    as_object = _checked_object if is_checked else _object
    try:
        value = json.loads(text, object_pairs_hook=as_object, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise InvalidFrame(f"{noun} is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise InvalidFrame(f"{noun} is not JSON: {error}") from None
    except ValueError as error:
        raise InvalidFrame(f"{noun} {error}") from None
    if is_checked and isinstance(value, str | list):
        try:
            _check_text("a text", value)
        except ValueError as error:
            raise InvalidFrame(f"{noun} {error}") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("has a duplicate key")
    return value


def _checked_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = _object(pairs)
    for name, item in pairs:
        if not is_storable(name):
            raise ValueError(f"has a NUL or half a surrogate pair in {name!a}")
        if isinstance(item, str | list):
            _check_text(f"{name!a}", item)
    return value


def _check_text(name: str, value: str | list[Any]) -> None:
    """Check a text, or the texts in a list. Objects in it were checked when they were decoded."""
    if isinstance(value, str):
        if not is_storable(value):
            raise ValueError(f"has a NUL or half a surrogate pair in {name}")
        return
    for item in value:
        if isinstance(item, str | list):
            _check_text(name, item)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"has {name}, which is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"has a number that is too large: {text[:20]}")
    return number
