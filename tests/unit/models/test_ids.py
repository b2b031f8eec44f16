"""Ids that sort by time."""

from __future__ import annotations

import time
from uuid import RFC_4122, UUID

import pytest

from anynode.models.ids import uuid7


def milliseconds_of(id: UUID) -> int:
    return id.int >> 80


def test_an_id_is_a_uuid_of_version_7() -> None:
    for _ in range(1000):
        id = uuid7()
        assert id.version == 7
        assert id.variant == RFC_4122


def test_an_id_holds_the_milliseconds_of_its_making() -> None:
    before = time.time_ns() // 1_000_000
    id = uuid7()
    assert before <= milliseconds_of(id) <= time.time_ns() // 1_000_000


def test_ids_are_distinct() -> None:
    assert len({uuid7() for _ in range(10_000)}) == 10_000


def test_a_later_id_is_greater(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for nanoseconds in (
        0,
        999_999,
        1_000_000,
        1_700_000_000_000_000_000,
        1_700_000_000_001_000_000,
        (2**48 - 1) * 10**6,
    ):
        monkeypatch.setattr(time, "time_ns", lambda now=nanoseconds: now)
        made.append(uuid7())
    assert [milliseconds_of(id) for id in made] == [0, 0, 1, 1_700_000_000_000, 1_700_000_000_001, 2**48 - 1]
    assert made[1:] == sorted(made[1:]) == sorted(made[1:], key=str)


def test_all_random_bits_vary() -> None:
    ones, zeros = 0, 0
    for _ in range(1000):
        value = uuid7().int
        ones |= value
        zeros |= ~value
    random_bits = (0xFFF << 64) | ((1 << 62) - 1)
    assert ones & random_bits == random_bits
    assert zeros & random_bits == random_bits
