"""Strict decoding of JSON: what could be read in two ways, or could not be stored, is refused. No I/O."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from anynode.models.text import is_storable
from anynode.server.errors import InvalidFrame


def strict_json(text: str, noun: str) -> Any:
    """Decode a JSON text strictly: no duplicate key, no NaN, no text that Postgres cannot store. Raises InvalidFrame,
    whose message begins with the noun."""
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise InvalidFrame(f"{noun} is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise InvalidFrame(f"{noun} is not JSON: {error}") from None
    except ValueError as error:
        raise InvalidFrame(f"{noun} {error}") from None
    if isinstance(value, str | list):
        try:
            _check_text("a text", value)
        except ValueError as error:
            raise InvalidFrame(f"{noun} {error}") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("has a duplicate key")
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
