"""How many frames, and bytes of them, a client may send."""

from __future__ import annotations

import pytest

from anynode.server.errors import RateLimited
from anynode.server.transport.allowance import (
    FRAME_BYTES_BURST,
    FRAME_BYTES_PER_SECOND,
    Allowance,
    FrameBytes,
    NotSlowingDown,
    size_of,
)

LONGEST = 409_600  # bytes of the longest frame of `/ws`


def refused(allowance: Allowance, now: float, frames: int) -> int:
    count = 0
    for _ in range(frames):
        try:
            allowance.take(now)
        except RateLimited:
            count += 1
    return count


def test_as_many_frames_as_the_burst_may_come_at_once() -> None:
    allowance = Allowance(10.0)
    assert refused(allowance, 10.0, 500) == 0
    with pytest.raises(RateLimited, match="More than 100 frames a second"):
        allowance.take(10.0)


@pytest.mark.parametrize(("seconds", "more"), [(0.01, 1), (0.5, 50), (1.0, 100), (5.0, 500), (1000.0, 500)])
def test_the_allowance_fills_up_again_with_time_and_not_beyond_the_burst(seconds: float, more: int) -> None:
    allowance = Allowance(0.0)
    refused(allowance, 0.0, 500)
    assert refused(allowance, seconds, 600) == 600 - more


def test_a_client_that_goes_on_sending_after_a_thousand_refusals_is_disconnected() -> None:
    allowance = Allowance(0.0)
    assert refused(allowance, 0.0, 1500) == 1000
    with pytest.raises(NotSlowingDown):
        allowance.take(0.0)


def test_a_pause_in_which_the_allowance_fills_up_makes_refusals_forgotten_and_a_shorter_one_does_not() -> None:
    allowance = Allowance(0.0)
    refused(allowance, 0.0, 1500)
    assert refused(allowance, 5.0, 1500) == 1000
    assert refused(allowance, 9.99, 499) == 0
    with pytest.raises(NotSlowingDown):
        refused(allowance, 9.99, 2)


def test_a_user_may_send_as_many_bytes_as_the_burst_at_once_and_a_shorter_frame_still_passes() -> None:
    frame_bytes = FrameBytes()
    for _ in range(FRAME_BYTES_BURST // LONGEST):
        frame_bytes.take("ada", 0.0, LONGEST)
    with pytest.raises(RateLimited, match="bytes of frames a second") as refused_frame:
        frame_bytes.take("ada", 0.0, LONGEST)
    missing = LONGEST - FRAME_BYTES_BURST % LONGEST
    error = refused_frame.value
    assert (error.limit, error.limit_max) == ("frame_bytes_per_second", FRAME_BYTES_PER_SECOND)
    assert 0 <= error.retry_after_ms - missing / FRAME_BYTES_PER_SECOND * 1000 < 1
    frame_bytes.take("ada", 0.0, 100)
    frame_bytes.take("bob", 0.0, FRAME_BYTES_BURST)


def test_a_refused_frame_costs_no_bytes_and_passes_when_the_refusal_says() -> None:
    frame_bytes = FrameBytes()
    frame_bytes.take("ada", 0.0, FRAME_BYTES_BURST)
    with pytest.raises(RateLimited) as refused_frame:
        frame_bytes.take("ada", 0.0, LONGEST)
    frame_bytes.take("ada", refused_frame.value.retry_after_ms / 1000, LONGEST)


def test_the_longest_frames_of_the_ai_sdk_pass_two_at_once_and_then_every_four_seconds() -> None:
    frame_bytes = FrameBytes()
    for now in (0.0, 0.0, 4.0, 8.0):
        frame_bytes.take("ada", now, 4_194_304)


def test_nothing_is_kept_of_users_that_have_sent_nothing_for_long() -> None:
    frame_bytes = FrameBytes()
    for number in range(1000):
        frame_bytes.take(f"user-{number}", 0.01 * number, 1000)
    assert len(frame_bytes) < 10
    frame_bytes.take("ada", 20.0, 1)
    frame_bytes.take("ada", 30.0, 1)
    frame_bytes.take("ada", 30.0, FRAME_BYTES_BURST - 1)
    with pytest.raises(RateLimited):
        frame_bytes.take("ada", 30.0, 1)


@pytest.mark.parametrize(("text", "size"), [("", 0), ("abc", 3), ("é", 2), ("日本", 6), ("\U0001f600", 4)])
def test_a_frame_is_as_long_as_its_bytes(text: str, size: int) -> None:
    assert size_of(text) == size
