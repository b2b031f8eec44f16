"""What a follower does next: a cursor over one conversation's journal, decided without a loop or a database.

The clocks. `Channel.changes` is a channel's version: it counts everything that may be news. `Log.over_at` is the
version at which a log was complete, or -1. A cursor's `_read_at` is the version up to which it has seen everything, or
-1: while it equals `changes`, there is nothing to read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

from anynode.models.events import Event, Reading
from anynode.models.rules import TERMINAL_TYPES


class Log:
    """The committed events of one turn from `first_seq` on, without a gap.

    `is_over`: no more events will be added. `over_at` is the channel's version at which the log held everything that
    was committed, or -1 if that is not known.
    """

    __slots__ = ("events", "first_seq", "is_doubtful", "is_over", "last_seq", "over_at")

    def __init__(self, first_seq: int, events: Sequence[Event] = ()) -> None:
        self.events = list(events)
        self.first_seq = first_seq
        self.last_seq = first_seq + len(events) - 1  # of the last event, or the seq before `first_seq`
        self.is_over = False
        self.is_doubtful = False  # an event may have been missed since the log began
        self.over_at = -1

    def extend(self, events: Sequence[Event]) -> None:
        """Add the events that follow."""
        self.events.extend(events)
        self.last_seq += len(events)

    def covers(self, cursor: int) -> bool:
        """Whether every event after the cursor is in this log, or will be."""
        return self.first_seq - 1 <= cursor <= self.last_seq

    def after(self, cursor: int) -> list[Event]:
        """Return the events after a cursor that the log covers."""
        return self.events[cursor + 1 - self.first_seq :]


class Channel:
    """A conversation that is followed here, or whose turn runs here, as plain state.

    `changes` is the channel's version. `heard_seq`: events up to it are no news, because every follower has them or is
    reading them already.
    """

    __slots__ = ("changes", "followers", "heard_seq", "log")

    def __init__(self) -> None:
        self.log: Log | None = None
        self.followers = 0
        self.changes = 0
        self.heard_seq = 0

    def wake(self) -> None:
        """Count a change. Where followers wait for one, the subclass wakes them."""
        self.changes += 1

    def begin(self, log: Log) -> None:
        """Let followers read from this log from now on; those that have read less than it begins with read on."""
        self.log = log
        self.wake()

    def end(self, log: Log, *, is_whole: bool) -> None:
        """Read no more from this log. `is_whole` says that the turn's last event is in it."""
        if self.log is log:
            self.log = None
        self.wake()
        if is_whole:
            # Not where the next turn may have begun already, or an event may have been missed.
            if self.heard_seq <= log.last_seq and not log.is_doubtful:
                log.over_at = self.changes
            self.heard_seq = max(self.heard_seq, log.last_seq)

    def hear(self, last_seq: int) -> None:
        """Note that events up to `last_seq` are committed somewhere."""
        if last_seq > self.heard_seq:
            self.heard_seq = last_seq
            self.wake()

    def doubt(self) -> None:
        """Note that anything may have happened, also that Postgres has lost events."""
        self.heard_seq = 0
        if self.log is not None:
            self.log.is_doubtful = True
        self.wake()

    def needs_log(self, reading: Reading) -> bool:
        """Whether a follower with this reading is at the end of a running turn that nobody here reads yet."""
        return self.log is None and reading.is_running and reading.is_complete and not reading.is_broken


# What a cursor needs before it can show more: from Postgres a snapshot of the conversation, or a reading of the events
# after it; or a change of its channel, as it has shown everything. Strings, as this is decided twice for each token and
# follower, and looking up the member of an Enum takes Python 3.11 longer than the decision.
Need: TypeAlias = Literal["snapshot", "reading", "change"]


class Cursor:
    """Where one follower is, and what it does next.

    `after` is the seq of the last event that was shown; None asks for a snapshot. `is_own` says that the conversation
    is known to be the user's: only then may the follower read from a log in memory.
    """

    __slots__ = ("_log", "_read_at", "after", "is_own")

    def __init__(self, after: int | None, *, is_own: bool) -> None:
        self.after = after
        self.is_own = is_own
        self._log: Log | None = None  # where the follower reads while a turn runs, or ran
        self._read_at = -1

    def next(self, channel: Channel) -> list[Event] | Need:
        """Return the next events from a log, which then count as shown, or what the cursor needs."""
        after = self.after
        if after is None:
            return "snapshot"
        while True:
            log = self._log
            if log is None:
                if self.is_own and channel.log is not None and channel.log.covers(after):
                    log = self._log = channel.log
                elif self._read_at == channel.changes:
                    return "change"
                else:
                    return "reading"
            if after < log.last_seq:
                self.after = log.last_seq
                return log.after(after)
            if not log.is_over:
                return "change"
            self._read_at = log.over_at
            self._log = None

    def take_snapshot(self, seq: int) -> None:
        """Continue after a snapshot as of `seq`."""
        self.after = seq
        self.is_own = True

    def take_reading(self, reading: Reading, changes: int) -> Sequence[Event]:
        """Return the events to show of a reading that began at the channel's version `changes`.

        What was committed during the reading is not known to be in it, so `changes` is not the version of now.
        """
        self.is_own = True
        if reading.is_broken:
            self.after = None
            return ()
        if reading.events:
            self.after = reading.events[-1].seq
        if reading.is_complete:
            self._read_at = changes
        return reading.events


# What a reading says about a turn that runs on another node.
# broken: the journal does not hold the log's place, so that its followers read by themselves
# over: the turn has ended, and no other runs
# next turn: the turn has ended; another runs, or there is more to read
# more: the turn runs, and has said more
# nothing: the turn runs
Outcome: TypeAlias = Literal["broken", "over", "next turn", "more", "nothing"]


def outcome_of(reading: Reading) -> Outcome:
    """Decide what becomes of the log of a turn that runs on another node."""
    if reading.is_broken:
        return "broken"
    if reading.is_complete and not reading.is_running:
        return "over"
    if any(event.type in TERMINAL_TYPES for event in reading.events):
        return "next turn"
    return "more" if reading.events else "nothing"
