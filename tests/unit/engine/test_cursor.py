"""What a follower does next: a table of cases for the cursor, the channel that it looks at, and the log it reads."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from anynode.models.events import Event, Reading
from anynode.server.engine.cursor import Channel, Cursor, Log, Need, Outcome, outcome_of


def events(*seqs: int, last: str = "turn.delta") -> list[Event]:
    """Events with these seqs, the last of them of this type."""
    made = [Event(seq, "turn.delta", "t", "{}") for seq in seqs]
    if made:
        made[-1].type = last
    return made


def reading(*seqs: int, is_broken: bool = False, is_complete: bool = True, is_running: bool = False) -> Reading:
    """What lies after a cursor, as Postgres says."""
    return Reading(events(*seqs), is_broken, is_complete, is_running)


def seqs(found: Sequence[Event] | Need) -> list[int]:
    """The seqs of what is shown."""
    assert not isinstance(found, str)
    return [event.seq for event in found]


def channel_with(log: Log | None) -> Channel:
    """A channel whose turn is in this log."""
    made = Channel()
    if log is not None:
        made.begin(log)
    return made


# The log.


@pytest.mark.parametrize(
    ("cursor", "covered", "after"),
    [(3, False, None), (4, True, [5, 6, 7]), (5, True, [6, 7]), (6, True, [7]), (7, True, []), (8, False, None)],
)
def test_a_log_covers_the_cursors_from_before_its_first_event_to_its_last(
    cursor: int, covered: bool, after: list[int] | None
) -> None:
    log = Log(5, events(5, 6, 7))
    assert log.covers(cursor) is covered
    if after is not None:
        assert seqs(log.after(cursor)) == after


def test_a_log_without_events_covers_the_cursor_that_it_begins_at() -> None:
    log = Log(5)
    assert [log.covers(cursor) for cursor in (3, 4, 5)] == [False, True, False]
    assert (log.last_seq, log.after(4)) == (4, [])


def test_a_log_grows() -> None:
    log = Log(5)
    log.extend(events(5, 6))
    log.extend([])
    log.extend(events(7))
    assert (log.last_seq, seqs(log.after(5)), log.covers(7)) == (7, [6, 7], True)


# The channel.


def test_every_change_is_another_version() -> None:
    channel = Channel()
    versions = [channel.changes]
    log = Log(1)
    channel.begin(log)
    versions.append(channel.changes)
    channel.end(log, is_whole=True)
    versions.append(channel.changes)
    channel.hear(9)
    versions.append(channel.changes)
    channel.doubt()
    versions.append(channel.changes)
    assert versions == sorted(set(versions))


@pytest.mark.parametrize(("heard", "is_news"), [(6, False), (7, False), (8, True)])
def test_what_was_heard_of_already_is_no_news(heard: int, is_news: bool) -> None:
    channel = Channel()
    channel.hear(7)
    before = channel.changes
    channel.hear(heard)
    assert (channel.changes > before, channel.heard_seq) == (is_news, max(7, heard))


def test_what_a_whole_log_has_is_no_news() -> None:
    channel = channel_with(log := Log(5, events(5, 6)))
    channel.end(log, is_whole=True)
    before = channel.changes
    channel.hear(6)
    assert (channel.changes, channel.log) == (before, None)


def test_after_a_log_that_is_not_whole_what_it_has_may_be_news() -> None:
    channel = channel_with(log := Log(5, events(5, 6)))
    channel.end(log, is_whole=False)
    before = channel.changes
    channel.hear(6)
    assert (channel.changes, log.over_at) == (before + 1, -1)


def test_a_whole_log_says_at_which_version_nothing_is_missing() -> None:
    channel = channel_with(log := Log(5, events(5, 6)))
    channel.end(log, is_whole=True)
    assert log.over_at == channel.changes


def test_a_log_at_whose_end_more_was_heard_of_does_not_say_that_nothing_is_missing() -> None:
    channel = channel_with(log := Log(5, events(5, 6)))
    channel.hear(7)
    channel.end(log, is_whole=True)
    assert (log.over_at, channel.heard_seq) == (-1, 7)


def test_a_log_that_may_have_missed_something_does_not_say_that_nothing_is_missing() -> None:
    channel = channel_with(log := Log(5, events(5, 6)))
    channel.doubt()
    channel.end(log, is_whole=True)
    assert (log.over_at, channel.heard_seq) == (-1, 6)


def test_after_a_doubt_everything_is_news() -> None:
    channel = Channel()
    channel.hear(7)
    channel.doubt()
    before = channel.changes
    channel.hear(3)
    assert channel.changes == before + 1


def test_the_end_of_an_older_log_leaves_the_newer_one() -> None:
    channel = channel_with(older := Log(1))
    channel.begin(newer := Log(5))
    channel.end(older, is_whole=False)
    assert channel.log is newer


@pytest.mark.parametrize(
    ("has_log", "found", "needed"),
    [
        (False, reading(is_running=True), True),
        (False, reading(5, is_running=True), True),
        (True, reading(is_running=True), False),  # others read it, and must not be moved
        (False, reading(is_running=False), False),
        (False, reading(5, is_running=True, is_complete=False), False),
        (False, reading(9, is_running=True, is_broken=True), False),
    ],
)
def test_a_log_is_needed_by_who_has_caught_up_with_a_turn_that_nobody_reads(
    has_log: bool, found: Reading, needed: bool
) -> None:
    assert channel_with(Log(1) if has_log else None).needs_log(found) is needed


# The cursor.


@pytest.mark.parametrize(
    ("after", "is_own", "log", "expected"),
    [
        (None, False, None, "snapshot"),
        (None, True, Log(5, events(5, 6)), "snapshot"),
        (4, True, None, "reading"),
        (4, True, Log(5, events(5, 6)), [5, 6]),
        (5, True, Log(5, events(5, 6)), [6]),
        (6, True, Log(5, events(5, 6)), "change"),
        (4, True, Log(5), "change"),
        (3, True, Log(5, events(5, 6)), "reading"),  # behind the log
        (7, True, Log(5, events(5, 6)), "reading"),  # ahead of it: the journal may have lost events
        (4, False, Log(5, events(5, 6)), "reading"),  # it may be somebody else's conversation
    ],
)
def test_what_a_cursor_does_first(after: int | None, is_own: bool, log: Log | None, expected: object) -> None:
    found = Cursor(after, is_own=is_own).next(channel_with(log))
    assert (found if isinstance(found, str) else seqs(found)) == expected


def test_a_cursor_shows_what_a_log_gains_once() -> None:
    channel = channel_with(log := Log(5, events(5)))
    cursor = Cursor(4, is_own=True)
    assert seqs(cursor.next(channel)) == [5]
    assert cursor.next(channel) == "change"
    log.extend(events(6, 7))
    assert seqs(cursor.next(channel)) == [6, 7]
    assert cursor.after == 7
    assert cursor.next(channel) == "change"


def test_who_is_not_known_to_own_the_conversation_reads_a_log_only_after_postgres_has_said_so() -> None:
    channel = channel_with(Log(5, events(5)))
    cursor = Cursor(4, is_own=False)
    assert cursor.next(channel) == "reading"
    cursor.take_reading(reading(is_running=True), channel.changes)
    assert seqs(cursor.next(channel)) == [5]


def test_a_snapshot_says_that_the_conversation_is_the_users() -> None:
    channel = channel_with(Log(5, events(5, 6)))
    cursor = Cursor(None, is_own=False)
    cursor.take_snapshot(5)
    assert seqs(cursor.next(channel)) == [6]


def test_after_a_whole_log_there_is_nothing_to_read_until_something_changes() -> None:
    channel = channel_with(log := Log(5, events(5)))
    cursor = Cursor(4, is_own=True)
    cursor.next(channel)
    log.is_over = True
    channel.end(log, is_whole=True)
    assert cursor.next(channel) == "change"
    channel.hear(6)
    assert cursor.next(channel) == "reading"


def test_after_a_log_that_is_not_whole_postgres_is_read() -> None:
    channel = channel_with(log := Log(5, events(5)))
    cursor = Cursor(4, is_own=True)
    cursor.next(channel)
    log.is_over = True
    channel.end(log, is_whole=False)
    assert cursor.next(channel) == "reading"


def test_a_slow_follower_keeps_a_log_that_is_over_until_it_has_shown_it_and_goes_on_in_the_next() -> None:
    channel = channel_with(log := Log(5, events(5)))
    slow = Cursor(4, is_own=True)
    assert seqs(slow.next(channel)) == [5]
    log.extend(events(6, last="turn.completed"))
    log.is_over = True
    channel.end(log, is_whole=True)
    channel.begin(Log(7, events(7)))
    assert seqs(slow.next(channel)) == [6]
    assert seqs(slow.next(channel)) == [7]
    assert slow.next(channel) == "change"


def test_a_complete_reading_is_repeated_only_after_a_change() -> None:
    channel = Channel()
    cursor = Cursor(4, is_own=True)
    assert cursor.next(channel) == "reading"
    assert seqs(cursor.take_reading(reading(5, 6), channel.changes)) == [5, 6]
    assert cursor.after == 6
    assert cursor.next(channel) == "change"
    channel.wake()
    assert cursor.next(channel) == "reading"


def test_what_changes_during_a_reading_does_not_count_as_read() -> None:
    channel = Channel()
    cursor = Cursor(4, is_own=True)
    changes = channel.changes
    channel.wake()
    cursor.take_reading(reading(), changes)
    assert cursor.next(channel) == "reading"


def test_a_reading_that_was_cut_for_its_length_is_read_on_from() -> None:
    channel = Channel()
    cursor = Cursor(4, is_own=True)
    assert seqs(cursor.take_reading(reading(5, 6, is_complete=False), channel.changes)) == [5, 6]
    assert cursor.next(channel) == "reading"
    assert cursor.after == 6


def test_a_broken_reading_is_not_shown_and_a_snapshot_comes_in_its_place() -> None:
    channel = Channel()
    cursor = Cursor(4, is_own=False)
    assert cursor.take_reading(reading(9, is_broken=True), channel.changes) == ()
    assert cursor.next(channel) == "snapshot"
    cursor.take_snapshot(9)
    assert cursor.next(channel) == "reading"
    assert cursor.is_own


# Turns that run on other nodes.


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (reading(is_running=True), "nothing"),
        (reading(5, is_running=True), "more"),
        (reading(5, is_running=True, is_complete=False), "more"),
        (reading(5, is_running=False, is_complete=False), "more"),  # its end is still to be read
        (reading(is_running=False, is_complete=False), "nothing"),
        (reading(is_running=False), "over"),
        (reading(5, is_running=False), "over"),
        (reading(9, is_running=True, is_broken=True), "broken"),
        (reading(is_running=False, is_broken=True), "broken"),
    ],
)
def test_what_a_reading_says_of_a_turn_elsewhere(found: Reading, expected: Outcome) -> None:
    assert outcome_of(found) == expected


@pytest.mark.parametrize("type", ["turn.completed", "turn.cancelled", "turn.failed"])
@pytest.mark.parametrize(
    ("is_running", "is_complete", "expected"),
    [(False, True, "over"), (True, True, "next turn"), (False, False, "next turn"), (True, False, "next turn")],
)
def test_where_a_turn_elsewhere_has_ended_another_may_run(
    type: str, is_running: bool, is_complete: bool, expected: Outcome
) -> None:
    assert outcome_of(Reading(events(5, 6, last=type), False, is_complete, is_running)) == expected
