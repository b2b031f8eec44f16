"""Mutations of server/engine/: the journal, followers, leases and what a node does with its turns."""

from __future__ import annotations

from typing import Final

from tests.mutations.mutation import Change, Mutation

CURSOR: Final = "server/engine/cursor.py"
FOLLOW: Final = "server/engine/follow.py"
JOURNAL: Final = "server/engine/journal.py"
LEASES: Final = "server/engine/leases.py"
WATCH: Final = "server/engine/watch.py"
NODE: Final = "server/engine/node.py"
RUNNING: Final = "server/engine/running_turns.py"

CRASHES: Final = "system/test_crashes.py"
CUT_POINTS: Final = "system/test_cut_points.py"
ANY_NODE: Final = "system/test_any_node.py"
PARTITION: Final = "system/test_partition.py"
SOCKET: Final = "system/test_socket.py"
STRANGERS: Final = f"{SOCKET}::test_somebody_elses_conversation_answers_like_one_that_does_not_exist"
TAKEOVER: Final = "system/test_takeover.py"

MUTATIONS: Final = (
    # A former owner goes on writing.
    Mutation(
        "leases are not renewed",
        [Change(LEASES, "                await self._renew()\n", "                pass\n")],
        [f"{CRASHES}::test_a_turn_is_not_taken_from_a_node_that_lives"],
    ),
    Mutation(
        "a node does not stop by itself when its lease runs out",
        [Change(LEASES, "if running.lease_until < now]", "if False]")],
        [PARTITION, "system/test_commit_then_deliver.py"],
    ),
    Mutation(
        "a node trusts a lease for longer than it lasts",
        [Change(LEASES, "settings.lease_seconds * 0.8", "settings.lease_seconds * 2")],
        [PARTITION, "system/test_commit_then_deliver.py"],
    ),
    Mutation(
        "a node trusts a lease from when the answer comes",
        [
            Change(
                LEASES,
                "else self._started_at + self._trusted_seconds",
                "else time.monotonic() + self._trusted_seconds",
            )
        ],
        ["unit/engine/test_leases.py"],
    ),
    Mutation(
        "a node that is told that a turn is not its own goes on with it",
        [
            Change(
                LEASES,
                'case "lose":\n                    running.lose()\n',
                'case "lose":\n                    pass\n',
            )
        ],
        ["system/test_leases.py"],
    ),
    # Commit, then deliver.
    Mutation(
        "events are published before their flush is known to be committed",
        [
            Change(
                JOURNAL,
                "            try:\n                refused = await flush(",
                "            for turn, entry in batch:\n"
                "                turn._on_committed(entry.events, entry.ending is not None)\n"
                "            try:\n                refused = await flush(",
            ),
            Change(JOURNAL, "        self._on_committed(entry.events, is_over)\n", ""),
        ],
        ["system/test_commit_then_deliver.py"],
    ),
    Mutation(
        "an ending that was committed by a first attempt counts as lost",
        [Change(JOURNAL, "refused -= await ended_under(", "await ended_under(")],
        [PARTITION],
    ),
    # Yours only.
    Mutation(
        "a stranger joins the log of a turn that runs",
        [Change(CURSOR, "if self.is_own and channel.log is not None", "if channel.log is not None")],
        [f"{SOCKET}::test_a_stranger_who_asked_to_follow_hears_nothing_of_later_turns", STRANGERS, SOCKET],
    ),
    # Following.
    Mutation(
        "a log shows the cursor's event again",
        [
            Change(
                CURSOR, "self.events[cursor + 1 - self.first_seq :]", "self.events[max(0, cursor - self.first_seq) :]"
            )
        ],
        [CUT_POINTS],
    ),
    Mutation(
        "a log is joined by those that are behind it",
        [Change(CURSOR, "return self.first_seq - 1 <= cursor <=", "return cursor <=")],
        [CUT_POINTS, ANY_NODE],
    ),
    Mutation(
        "a follower that has caught up moves the log that others read",
        [Change(CURSOR, "return self.log is None and reading.is_running and", "return reading.is_running and")],
        [ANY_NODE, "system/test_shared_reading.py"],
    ),
    Mutation(
        "followers elsewhere are not woken by a turn that begins",
        [
            Change(
                CURSOR,
                "            self.heard_seq = last_seq\n            self.wake()\n",
                "            self.heard_seq = last_seq\n",
            )
        ],
        [ANY_NODE],
    ),
    Mutation(
        "what changes during a reading counts as read",
        [Change(FOLLOW, "cursor.take_reading(reading, changes)", "cursor.take_reading(reading, channel.changes)")],
        ["system/test_wake_up.py"],
    ),
    Mutation(
        "the log of a lost turn is taken for the whole of it",
        [Change(RUNNING, "is_whole=not running.journal.is_lost", "is_whole=True")],
        [PARTITION, TAKEOVER],
    ),
    # Messages without a turn, deletions, those who wait.
    Mutation(
        "who waits for a turn is not told of a drain",
        [Change(NODE, "        self.drained.set()\n", "")],
        ["unit/engine/test_node.py", "system/test_rest_turns.py"],
    ),
    # Takeover, cancel, drain.
    Mutation(
        "a takeover ignores that a cancel was asked for",
        [Change(LEASES, "        if taken.cancel_requested:\n", "        if False:\n")],
        [f"{CRASHES}::test_a_cancel_that_was_asked_for_while_the_node_was_dead_is_honoured", TAKEOVER],
    ),
    Mutation(
        "a turn may be attempted for ever",
        [Change(LEASES, "elif taken.is_exhausted:", "elif False:")],
        [f"{CRASHES}::test_a_turn_that_kills_its_nodes_fails_after_the_last_attempt_and_the_next_message_works"],
    ),
    Mutation(
        "a takeover does not tell the agent of completed steps",
        [Change(LEASES, "steps=history_of_steps(steps)", "steps=history_of_steps([])")],
        [TAKEOVER],
    ),
    Mutation(
        "a takeover does not keep completed steps",
        [Change(LEASES, "running.keep(steps, partial)", "running.keep([], partial)")],
        [TAKEOVER],
    ),
    Mutation(
        "a follower's node takes a lapsed turn over at its next beat only",
        [Change(FOLLOW, "                on_lapsed()\n", "                pass\n")],
        [TAKEOVER],
    ),
    Mutation(
        "a cancel at another node is not heard of",
        [
            Change(WATCH, "for turn_id in news.to_cancel:", "for turn_id in ():"),
            Change(LEASES, 'return "cancel" if cancel_requested else "keep"', 'return "keep"'),
        ],
        ["unit/engine/test_watch.py", "system/test_cancel.py"],
    ),
    Mutation(
        "revocations are not read again after a gap",
        [Change(WATCH, "await _hear_all(database, revocations)", "pass")],
        ["unit/engine/test_watch.py"],
    ),
    Mutation(
        "a drain does not hand its turns over",
        [Change(NODE, "                await self._leases.release(left)\n", "")],
        [
            "unit/engine/test_node.py",
            f"{CRASHES}::test_a_turn_that_outlasts_the_drain_is_handed_over_at_once",
            "system/test_drain.py",
        ],
    ),
    Mutation(
        "a node that drains admits messages",
        [
            Change(NODE, "        self.draining.set()\n", ""),
            Change("server/app.py", "        self.node.draining.set()\n", ""),
        ],
        [
            "unit/engine/test_node.py",
            f"{CRASHES}::test_a_draining_node_admits_nothing_and_says_so",
            "system/test_drain.py",
        ],
    ),
    Mutation(
        "a node that drains takes turns over",
        [Change(NODE, "        self._leases.may_take_over = False\n", "")],
        ["unit/engine/test_node.py", "system/test_leases.py"],
    ),
    # Postgres.
    Mutation(
        "who has stopped a turn interrupts the next one",
        [Change(NODE, "admission.turn_id == wait_for", "wait_for is not None")],
        ["unit/engine/test_node.py", "system/test_ai_sdk_socket.py"],
    ),
    Mutation(
        "an address that comes while Postgres is away is lost",
        [Change("server/engine/users.py", "            self._notes.put_back()\n", "            self._notes.drop()\n")],
        ["unit/engine/test_users.py", "system/test_emails.py"],
    ),
    Mutation(
        "an address is written with each request",
        [Change("server/engine/users.py", "if self._last(user_id, now) == email:", "if False:")],
        ["unit/engine/test_users.py", "system/test_emails.py"],
    ),
)
