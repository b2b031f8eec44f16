"""The pure parts of the benchmarks under faults: what clients have seen, gaps, delays, the table without a floor."""

from __future__ import annotations

import pytest

from bench.clients import is_ending, is_from, is_type
from bench.report import Figure, Target, lines, table
from bench.seen import Frame, Seen, Stored, behind, fault_in, longest_gap, token_numbers

WHOLE = Stored("completed", "w0 w1 w2 ", 6, [1, 2, 3, 4, 5, 6])
ENDED = Seen("w0 w1 w2 ", 6, [1.0, 1.1, 1.2], 0, "turn.completed")


def delta(seq: int, text: str) -> Frame:
    """A piece of text."""
    return {"type": "turn.delta", "seq": seq, "text": text}


def seen_of(*frames: Frame) -> Seen:
    """What a client has seen after these frames, one a second."""
    seen = Seen()
    for at, frame in enumerate(frames):
        seen.hear(frame, float(at))
    return seen


def test_a_client_shows_the_text_that_came_and_notes_when() -> None:
    seen = seen_of({"type": "turn.started", "seq": 2}, delta(3, "w0 "), delta(5, "w1 w2 "))
    assert seen == Seen("w0 w1 w2 ", 5, [1.0, 2.0], 0, None)


def test_a_restart_replaces_the_text_and_is_no_text_itself() -> None:
    seen = seen_of(delta(3, "w0 w1 "), {"type": "turn.restarted", "seq": 4, "text": ""}, delta(5, "w0 "))
    assert (seen.text, seen.restarts, seen.came) == ("w0 ", 1, [0.0, 2.0])


def test_a_snapshot_replaces_the_text_by_that_of_the_running_turn() -> None:
    snapshot = {"type": "conversation.snapshot", "seq": 9, "turn": {"text": "w0 w1 w2 "}}
    assert seen_of(delta(3, "w0 "), snapshot).text == "w0 w1 w2 "
    assert seen_of(delta(3, "w0 "), snapshot | {"turn": None}).text == "w0 "


@pytest.mark.parametrize("ending", ["turn.completed", "turn.cancelled", "turn.failed"])
def test_an_ending_is_noted(ending: str) -> None:
    assert seen_of(delta(3, "w0 "), {"type": ending, "seq": 4}).ending == ending


def test_the_longest_gap_is_the_longest_one_that_lasts_beyond_the_fault() -> None:
    came = [0.0, 5.0, 5.1, 7.1, 7.2]
    assert longest_gap(came, since=6.0) == pytest.approx(2.0)
    assert longest_gap(came, since=4.0) == pytest.approx(5.0)
    assert longest_gap(came, since=7.15) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="nothing came"):
        longest_gap(came, since=7.2)


def test_a_whole_answer_that_client_and_database_agree_on_is_right() -> None:
    assert fault_in(ENDED, WHOLE, "w0 w1 w2 ") is None


@pytest.mark.parametrize(
    ("seen", "stored", "fault"),
    [
        (ENDED, Stored("failed", "w0 w1 w2 ", 6, WHOLE.seqs), "ended as failed"),
        (Seen("w0 w1 w2 ", 6, [], 0, None), WHOLE, "at the client as None"),
        (ENDED, Stored("completed", "w0 w1 ", 6, WHOLE.seqs), "the database has"),
        (Seen("w0 w2 ", 6, [], 0, "turn.completed"), WHOLE, "the client has 6 characters"),
        (ENDED, Stored("completed", "w0 w1 w2 ", 6, [1, 2, 4, 5, 6]), "not gapless"),
        (ENDED, Stored("completed", "w0 w1 w2 ", 5, WHOLE.seqs), "not gapless"),
        (Seen("w0 w1 w2 ", 5, [], 0, "turn.completed"), WHOLE, "ends at seq 5"),
    ],
)
def test_what_is_wrong_with_an_answer_is_found(seen: Seen, stored: Stored, fault: str) -> None:
    assert fault in (fault_in(seen, stored, "w0 w1 w2 ") or "")


def test_an_event_is_behind_by_the_frame_that_holds_it_where_several_are_merged() -> None:
    local = [(3, 1.0), (4, 1.1), (5, 1.2)]
    assert behind(local, [(2, 0.5), (4, 1.15), (5, 1.2)]) == pytest.approx([0.15, 0.05, 0.0])


def test_an_event_that_never_came_is_not_left_out() -> None:
    with pytest.raises(IndexError):
        behind([(3, 1.0), (4, 1.1)], [(3, 1.0)])


def test_the_tokens_of_a_turn_are_numbered_through_its_deltas() -> None:
    frames = [{"type": "turn.started", "seq": 2}, delta(3, "w7 w8 "), delta(4, "w9 w10 ")]
    assert token_numbers(frames) == [7, 8, 9, 10]
    assert token_numbers([]) == []


def test_frames_are_told_apart() -> None:
    frame = delta(5, "w0 ")
    assert is_type("turn.delta")(frame)
    assert not is_type("turn.started")(frame)
    assert [is_from(seq)(frame) for seq in (4, 5, 6)] == [True, True, False]
    assert is_ending({"type": "turn.failed", "seq": 6})
    assert not is_ending(frame)


@pytest.mark.parametrize(("worst", "verdict"), [(7.9, "≤ 8 met"), (8.1, "≤ 8 MISSED")])
def test_the_worst_round_must_meet_its_target(worst: float, verdict: str) -> None:
    target = Target("worst", 8)
    rounds = [[Figure("gap max, s", value, target)] for value in (4.0, worst, 5.0)]
    (line,) = lines(rounds, [])
    assert line.verdict == verdict


def test_none_is_a_target_too() -> None:
    (line,) = lines([[Figure("restarted", 0, Target("worst", 0))]], [])
    assert line.verdict == "≤ 0 met"
    (line,) = lines([[Figure("restarted", 1, Target("worst", 0))]], [])
    assert line.verdict == "≤ 0 MISSED"


def test_without_a_floor_the_table_has_no_columns_for_it() -> None:
    product = [[Figure("gap max, s", 4.0, Target("worst", 8)), Figure("gap p50, s", 2.0)]]
    assert table({"kill": lines(product, [])}, has_floor=False).splitlines() == [
        "              product  target",
        "kill",
        "  gap max, s  4        ≤ 8 met",
        "  gap p50, s  2",
    ]
