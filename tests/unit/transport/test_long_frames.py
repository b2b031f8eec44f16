"""What is long is encoded in a thread, and what is short at once."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from anynode.models.conversations import Snapshot
from anynode.models.events import Event
from anynode.server.transport.long_frames import AT_ONCE_CHARACTERS_MAX, characters_of, encode_rows, encode_update

MAX = AT_ONCE_CHARACTERS_MAX


def row(content: int, calls: int | None = None) -> Any:
    return {"content": "x" * content, "tool_calls": None if calls is None else "x" * calls}


def snapshot(*rows: Any, text: int = 0) -> Snapshot:
    return Snapshot(1, None, "x" * text, rows)


def event(characters: int) -> Event:
    return Event(1, "turn.delta", "t", "x" * characters)


def encoder(prefix: str, update: object) -> tuple[str, object, bool]:
    """What it was given, and whether it runs beside the loop."""
    return prefix, update, threading.current_thread() is not threading.main_thread()


@pytest.mark.parametrize(
    ("update", "characters"),
    [([event(2), event(3)], 5), (snapshot(), 0), (snapshot(row(2), row(3, 4), text=5), 14)],
)
def test_the_length_of_an_update_is_that_of_its_texts(update: Any, characters: int) -> None:
    assert characters_of(update) == characters


@pytest.mark.parametrize(
    ("update", "is_beside"),
    [
        ([event(MAX)], False),
        ([event(MAX), event(1)], True),
        (snapshot(row(MAX)), False),
        (snapshot(row(0, MAX), text=1), True),
    ],
)
async def test_a_long_update_is_encoded_beside_the_loop(update: Any, is_beside: bool) -> None:
    assert await encode_update(update, encoder, "frames") == ("frames", update, is_beside)


@pytest.mark.parametrize(("rows", "is_beside"), [([row(MAX)], False), ([row(MAX), row(0, 1)], True)])
async def test_a_long_page_is_encoded_beside_the_loop(rows: list[Any], is_beside: bool) -> None:
    assert await encode_rows(rows, encoder, "page", rows) == ("page", rows, is_beside)


async def test_an_error_of_the_encoder_is_the_callers() -> None:
    def fail(update: object) -> None:
        raise KeyError

    for characters in (1, MAX + 1):
        with pytest.raises(KeyError):
            await encode_update([event(characters)], fail)
