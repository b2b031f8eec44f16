"""The fields of a conversation that its owner sets, as the database takes them. No I/O."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Final

import msgspec
from msgspec import UNSET

from anynode.server.errors import InvalidFrame, MessageTooLarge, Problem
from anynode.server.protocol.bodies import Body

METADATA_BYTES_MAX: Final = 16_384
METADATA_DEPTH_MAX: Final = 100


def stored_fields(body: Body, *, system_prompt_bytes_max: int) -> dict[str, str | None]:
    """Return the fields that a body has, with `metadata` as JSON. Raises InvalidFrame or MessageTooLarge."""
    fields: dict[str, str | None] = {}
    for name, value in msgspec.structs.asdict(body).items():
        if name == "metadata" and value is not UNSET:
            if _is_deep(value):
                raise InvalidFrame(problems=[Problem(name, "is nested too deeply")])
            value = msgspec.json.encode(value).decode()
        if value is not UNSET:
            fields[name] = value
    if len((fields.get("system_prompt") or "").encode()) > system_prompt_bytes_max:
        raise MessageTooLarge(f"system_prompt is longer than {system_prompt_bytes_max} bytes.")
    if _stored_bytes(fields.get("metadata") or "") > METADATA_BYTES_MAX:
        raise MessageTooLarge(f"metadata is longer than {METADATA_BYTES_MAX} bytes.")
    return fields


def _is_deep(value: object) -> bool:
    level = [value]
    for _ in range(METADATA_DEPTH_MAX):
        level = [item for each in level for item in _items(each)]
    return bool(level)


def _items(value: object) -> Iterable[object]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _stored_bytes(text: str) -> int:
    """Return how many bytes JSON has as Postgres stores it: numbers with all their digits, 1e308 with 309."""
    size = len(text.encode())

    def count(number: str) -> float:
        nonlocal size
        size += abs(int(number.lower().partition("e")[2] or 0))
        return 0.0

    if text:
        json.loads(text, parse_float=count)
    return size
