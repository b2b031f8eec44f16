"""Bytes of bodies that are being read: a part for each user, and a bound for all."""

from __future__ import annotations

import pytest

from anynode.server.errors import RateLimited
from anynode.server.settings import Settings
from anynode.server.transport.shares import READ_BYTES_MAX, READ_BYTES_PER_USER_MAX, ReadBytes, Shares


def test_a_user_may_send_an_eighth_of_what_a_node_reads() -> None:
    assert READ_BYTES_PER_USER_MAX * 8 == READ_BYTES_MAX
    reading = Shares(Settings()).reading
    reading.take("ada", READ_BYTES_PER_USER_MAX)
    with pytest.raises(RateLimited):
        reading.take("ada", 1)
    reading.take("bob", READ_BYTES_PER_USER_MAX)


def test_bytes_count_until_they_are_given_back_and_refused_ones_do_not() -> None:
    reading = ReadBytes(10, 6)
    reading.take("ada", 6)
    with pytest.raises(RateLimited) as refused:
        reading.take("ada", 1)
    assert (refused.value.limit, refused.value.limit_max) == ("read_bytes_per_user_max", 6)
    reading.take("bob", 4)
    with pytest.raises(RateLimited) as refused:
        reading.take("bob", 1)
    assert (refused.value.limit, refused.value.limit_max) == ("read_bytes_max", 10)
    reading.give_back("ada", 6)
    reading.take("bob", 2)
    reading.give_back("bob", 6)
    assert reading.total == 0
    reading.take("ada", 6)
