"""The pure parts of the benchmarks: frames, percentiles, the table."""

from __future__ import annotations

import random
from collections.abc import Generator

import pytest
from websockets.frames import Frame, Opcode
from websockets.streams import StreamReader

from bench.load import CLOSE, PING, TEXT, FrameParser, LoadError, client_frame, text_in
from bench.report import Figure, Spread, Target, lines, percentile, short, table


def server_frame(first_byte: int, payload: bytes) -> bytes:
    """A frame as servers send them: not masked."""
    length = len(payload)
    if length < 126:
        return bytes((first_byte, length)) + payload
    if length < 65_536:
        return bytes((first_byte, 126)) + length.to_bytes(2, "big") + payload
    return bytes((first_byte, 127)) + length.to_bytes(8, "big") + payload


LENGTHS = (0, 1, 125, 126, 127, 65_535, 65_536)


def test_frames_of_every_length_are_cut_out_of_one_piece() -> None:
    sent = [(TEXT, b"x" * length) for length in LENGTHS] + [(PING, b"p"), (CLOSE, b"\x03\xe8")]
    stream = b"".join(server_frame(*frame) for frame in sent)
    assert FrameParser().feed(stream) == sent


def test_it_does_not_matter_how_the_stream_is_cut_into_pieces() -> None:
    sent = [(TEXT, bytes([number]) * length) for number, length in enumerate((0, 1, 125, 126, 300, 65_536, 2))]
    stream = b"".join(server_frame(*frame) for frame in sent)
    dice = random.Random(7)
    for _ in range(50):
        parser, received, start = FrameParser(), [], 0
        while start < len(stream):
            end = start + dice.choice((1, 2, 3, 7, 200, 40_000))
            received += parser.feed(stream[start:end])
            start = end
        assert received == sent


def test_a_frame_is_held_back_until_its_last_byte_is_there() -> None:
    frame = server_frame(TEXT, b"y" * 200)
    parser = FrameParser()
    for at in range(len(frame) - 1):
        assert parser.feed(frame[at : at + 1]) == []
    assert parser.feed(frame[-1:]) == [(TEXT, b"y" * 200)]


def test_a_masked_frame_of_a_server_is_refused() -> None:
    with pytest.raises(LoadError, match="masked"):
        FrameParser().feed(client_frame(TEXT, b"hello"))


@pytest.mark.parametrize("length", LENGTHS)
def test_a_client_frame_is_one_that_websockets_understands(length: int) -> None:
    reader = StreamReader()
    reader.feed_data(client_frame(TEXT, b"z" * length))
    parsed = []

    def parse() -> Generator[None, None, None]:
        parsed.append((yield from Frame.parse(reader.read_exact, mask=True)))

    assert list(parse()) == []  # it waits for nothing more
    assert parsed == [Frame(Opcode.TEXT, b"z" * length)]


@pytest.mark.parametrize(
    ("frame", "text"),
    [
        (b'{"type":"turn.delta","seq":3,"turn_id":"x","text":"12345 12400 "}', b"12345 12400 "),
        (b'{"type":"turn.delta","seq":3,"turn_id":"x","text": "w0 w1 "}', b"w0 w1 "),  # as jsonb shows it
        (b'{"type":"turn.delta","text":""}', b""),
    ],
)
def test_the_text_of_a_delta_is_found_in_its_bytes(frame: bytes, text: bytes) -> None:
    assert text_in(frame) == text


def test_a_percentile_is_a_value_that_occurred() -> None:
    values = [float(value) for value in range(1, 101)]
    random.Random(1).shuffle(values)
    assert percentile(values, 50) == 50
    assert percentile(values, 99) == 99
    assert percentile(values, 100) == 100
    assert percentile(values, 0) == 1
    assert percentile([3.0], 99) == 3
    assert percentile([1.0, 2.0, 3.0], 50) == 2
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_the_ratio_is_taken_in_each_round_and_then_its_median() -> None:
    product = [[Figure("ms", 3.0)], [Figure("ms", 8.0)], [Figure("ms", 30.0)]]
    floor = [[Figure("ms", 1.0)], [Figure("ms", 4.0)], [Figure("ms", 15.0)]]
    (line,) = lines(product, floor)
    assert line.product == Spread(8.0, 3.0, 30.0)
    assert line.floor == Spread(4.0, 1.0, 15.0)
    assert line.ratio == Spread(2.0, 2.0, 3.0)


def test_what_the_floor_does_not_have_is_not_compared() -> None:
    figures = [[Figure("only ours", 5.0, Target("product", 4.0)), Figure("both", 1.0)]]
    ours, both = lines(figures, [[Figure("both", 0.0)]])
    assert ours.floor is None
    assert ours.ratio is None
    assert ours.verdict == "≤ 4 MISSED"
    assert both.floor == Spread(0.0, 0.0, 0.0)
    assert both.ratio is None  # nothing can be divided by nothing


@pytest.mark.parametrize(
    ("target", "verdict"),
    [
        (None, ""),
        (Target("ratio", 1.5), "≤ 1.5× met"),
        (Target("ratio", 1.4), "≤ 1.4× MISSED"),
        (Target("product", 6), "≤ 6 met"),
        (Target("product", 5.9), "≤ 5.9 MISSED"),
    ],
)
def test_the_verdict_compares_the_median_with_the_target(target: Target | None, verdict: str) -> None:
    (line,) = lines([[Figure("ms", 6.0, target)]], [[Figure("ms", 4.0)]])
    assert line.verdict == verdict


def test_the_table_has_a_row_for_each_line_under_its_measure() -> None:
    target = Target("ratio", 1.5)
    product = [[Figure("p50, ms", 1.5, target), Figure("flushes/s", 40.0)], [Figure("p50, ms", 3.0, target)]]
    floor = [[Figure("p50, ms", 1.0)], [Figure("p50, ms", 2.0)]]
    assert table({"first_token": lines(product, floor)}).splitlines() == [
        "             product       floor      product/floor  target",
        "first_token",
        "  p50, ms    2.25 (1.5–3)  1.5 (1–2)  1.5            ≤ 1.5× met",
        "  flushes/s  40            –          –",
    ]


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (0.00123456, "0.00123"), (0.1, "0.1"), (1.0, "1"), (12.345, "12.3"), (123.4, "123"), (52_345, "52,300")],
)
def test_numbers_have_three_significant_digits(number: float, text: str) -> None:
    assert short(number) == text
