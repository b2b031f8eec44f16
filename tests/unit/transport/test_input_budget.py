"""How much a WebSocket may send: its budget, and where the frames and messages of its input begin and end."""

from __future__ import annotations

import math
import random

import pytest

from anynode.server.transport.input_budget import FrameHeaders, InputBudget, Rates
from tests.kit.listening import frame

RATES = Rates(frames_burst=10, frames_per_second=2.0, bytes_burst=1000, bytes_per_second=100.0)
FIRST = Rates(frames_burst=4, frames_per_second=0.0, bytes_burst=1000, bytes_per_second=0.0)


# The budget.


def test_a_burst_may_come_at_once_and_not_one_frame_more() -> None:
    budget = InputBudget(RATES, 5.0)
    assert budget.take(10, 10, 5.0) == 0.0
    assert budget.take(1, 1, 5.0) == math.inf


@pytest.mark.parametrize(("seconds", "more"), [(0.5, 1), (2.0, 4), (5.0, 10), (1000.0, 10)])
def test_frames_fill_up_again_with_time_and_not_beyond_the_burst(seconds: float, more: int) -> None:
    budget = InputBudget(RATES, 0.0)
    budget.take(10, 0, 0.0)
    assert budget.take(more, 0, seconds) == 0.0
    assert budget.take(1, 0, seconds) == math.inf


def test_too_many_bytes_are_waited_for_and_not_refused() -> None:
    budget = InputBudget(RATES, 0.0)
    assert budget.take(1, 1000, 0.0) == 0.0
    assert budget.take(1, 300, 0.0) == pytest.approx(3.0)
    assert budget.take(1, 100, 3.0) == pytest.approx(1.0)
    assert budget.take(0, 0, 14.0) == 0.0


def test_without_a_refill_too_many_bytes_are_refused() -> None:
    budget = InputBudget(FIRST, 0.0)
    assert budget.take(1, 1000, 0.0) == 0.0
    assert budget.take(0, 1, 1e6) == math.inf


# The headers.


def pieces(headers: FrameHeaders, data: bytes, frames_max: int = 64) -> list[tuple[bytes, int]]:
    """The pieces into which some input is cut, with the number of frames that begin in each."""
    found, at = [], 0
    while at < len(data):
        end, frames = headers.cut(data, at, frames_max)
        assert end > at
        found.append((data[at:end], frames))
        at = end
    return found


@pytest.mark.parametrize("length", [0, 1, 125, 126, 127, 65_535, 65_536, 200_000])
def test_a_piece_ends_where_a_message_does(length: int) -> None:
    one, two = frame(1, b"a" * length), frame(2, b"b" * length)
    headers = FrameHeaders()
    assert pieces(headers, one + two) == [(one, 1), (two, 1)]
    assert headers.is_between_messages


def test_control_frames_are_counted_and_part_of_a_piece() -> None:
    data = frame(9, b"ping") * 3 + frame(10) + frame(1, b"text")
    assert pieces(FrameHeaders(), data + frame(9)) == [(data, 5), (frame(9), 1)]


def test_a_piece_has_no_more_frames_than_it_may() -> None:
    assert [count for _, count in pieces(FrameHeaders(), frame(9) * 10, 4)] == [4, 4, 2]


def test_fragments_are_one_message() -> None:
    data = frame(1, b"a", fin=False) + frame(0, b"b", fin=False) + frame(9) + frame(0, b"c")
    headers = FrameHeaders()
    assert pieces(headers, data) == [(data, 4)]
    assert headers.is_between_messages
    assert [count for _, count in pieces(headers, frame(1, b"a", fin=False))] == [1]
    assert not headers.is_between_messages


def test_a_piece_ends_before_a_close_frame() -> None:
    headers = FrameHeaders()
    assert pieces(headers, frame(9) + frame(8, b"\x03\xe8")) == [(frame(9), 1), (frame(8, b"\x03\xe8"), 1)]


def test_what_belongs_to_a_ping_or_a_pong_is_told_apart_wherever_it_is_cut() -> None:
    for opcode, is_ping in ((9, True), (10, True), (8, False), (1, False), (2, False)):
        data = frame(opcode, b"payload")
        headers = FrameHeaders()
        for at in range(len(data)):
            assert headers.is_ping(data[at : at + 1], 0) == is_ping
            headers.cut(data[at : at + 1], 0, 1)


def test_a_frame_without_a_mask_is_passed_on_for_the_parser_to_refuse() -> None:
    data = frame(1, b"abc", mask=None)
    assert pieces(FrameHeaders(), data + frame(9)) == [(data, 1), (frame(9), 1)]


def test_input_that_comes_byte_by_byte_is_cut_at_the_same_places() -> None:
    messages = [frame(1, b"x" * length) for length in (0, 5, 125, 126, 300, 65_536)]
    headers = FrameHeaders()
    for message in messages:
        counted = 0
        for at in range(len(message)):
            end, frames = headers.cut(message[at : at + 1], 0, 64)
            assert end == 1
            counted += frames
            assert headers.is_between_messages == (at == len(message) - 1)
        assert counted == 1


def test_input_that_is_cut_anywhere_has_the_same_frames() -> None:
    chance = random.Random(7)
    kinds = [(1, True), (2, True), (9, True), (10, True), (1, False), (0, False), (0, True), (8, True)]
    for _ in range(300):
        frames = [
            frame(opcode, b"x" * chance.choice([0, 1, 100, 125, 126, 500]), fin=fin)
            for opcode, fin in chance.choices(kinds, k=8)
        ]
        data = b"".join(frames)
        cuts = sorted(chance.sample(range(1, len(data)), min(5, len(data) - 1)))
        headers = FrameHeaders()
        parts = [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        assert sum(count for part in parts for _, count in pieces(headers, part, 3)) == len(frames)


def test_the_longest_length_is_read() -> None:
    headers = FrameHeaders()
    assert headers.cut(b"\x82\xff" + (2**63).to_bytes(8, "big") + b"abcd", 0, 64) == (14, 1)
    assert not headers.is_between_messages
