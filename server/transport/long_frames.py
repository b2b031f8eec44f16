"""Encoding of what may be long: beside the event loop, so that the other turns of the node go on meanwhile.

What one follower is shown stays in order: its caller waits for the frames before it asks for more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final, ParamSpec, TypeVar

from anynode.models.conversations import Snapshot
from anynode.models.events import Event

AT_ONCE_CHARACTERS_MAX: Final = 65_536  # more is encoded in a thread; it takes a fraction of a millisecond

Arguments = ParamSpec("Arguments")
Encoded = TypeVar("Encoded")


async def encode_update(update: Snapshot | Sequence[Event], encode: Callable[..., Encoded], *arguments: Any) -> Encoded:
    """Return `encode(*arguments, update)`, called in a thread where the update is long."""
    if characters_of(update) <= AT_ONCE_CHARACTERS_MAX:
        return encode(*arguments, update)
    return await asyncio.to_thread(encode, *arguments, update)


async def encode_rows(
    rows: Sequence[Any], encode: Callable[Arguments, Encoded], *arguments: Arguments.args, **options: Arguments.kwargs
) -> Encoded:
    """Return `encode(…)`, called in a thread where the messages in `rows` are long."""
    if _characters_of_rows(rows) <= AT_ONCE_CHARACTERS_MAX:
        return encode(*arguments, **options)
    return await asyncio.to_thread(encode, *arguments, **options)


def characters_of(update: Snapshot | Sequence[Event]) -> int:
    """Return about how long the frames of an update are."""
    if isinstance(update, Snapshot):
        return len(update.running_text) + _characters_of_rows(update.messages)
    return sum(len(event.payload) for event in update)


def _characters_of_rows(rows: Sequence[Any]) -> int:
    return sum(len(row["content"]) + len(row["tool_calls"] or "") for row in rows)
