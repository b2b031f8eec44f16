"""Breaks the product in one place at a time, in a copy of it, and sees that the tests notice; `make mutants`.

It takes names of mutations, or parts of them, and `--list` lists them. A mutation is an exact replacement; where its
text is not there as often as it should be, nothing is run. The tests run one after another: several are about time.
All of it takes about half an hour.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

TOP: Final = Path(__file__).resolve().parent.parent
SECONDS_MAX: Final = 240.0  # for one run of tests that should notice; one that takes longer hangs
SECONDS_MAX_UNCHANGED: Final = 1800.0
CLEANING_UP_SECONDS: Final = 30.0
RED: Final = re.compile(r"^(?:FAILED|ERROR) (?:tests/)?(.+?)(?: - .*)?$", re.MULTILINE)


class Change(NamedTuple):
    """`old`, so many times in the file, becomes `new`. `within`: only in the paragraph with this in it."""

    file: str
    old: str
    new: str
    times: int = 1
    within: str = ""


@dataclass(frozen=True)
class Mutation:
    """What is broken, in words; where; and tests, below tests/, that should notice, the likeliest first."""

    name: str
    changes: Sequence[Change]
    tests: Sequence[str]


CURSOR: Final = "server/engine/cursor.py"
FOLLOW: Final = "server/engine/follow.py"
JOURNAL: Final = "server/engine/journal.py"
LEASES: Final = "server/engine/leases.py"
NODE: Final = "server/engine/node.py"
RUNNING: Final = "server/engine/running_turns.py"
EVENTS: Final = "models/events.py"
QUERIES: Final = "models/queries.sql"
FIRST: Final = "models/migrations/0001_initial.py"
SECOND: Final = "models/migrations/0002_many_nodes.py"
THIRD: Final = "models/migrations/0003_rest.py"
FIFTH: Final = "models/migrations/0005_chats.py"
CHUNKS: Final = "server/api/ai_sdk/fold.py"
CHUNK_STREAM: Final = "server/api/ai_sdk/stream.py"
AI_SDK_CONNECTION: Final = "server/api/ai_sdk/connection.py"
WAITING: Final = "server/api/ai_sdk/newer.py"
RESPONSES: Final = "server/api/openai/handlers.py"
FOURTH: Final = "models/migrations/0004_pending_calls.py"

MESSAGES: Final = "system/test_rest_messages.py"
OWNERS: Final = "database/test_turns.py"
CRASHES: Final = "system/test_crashes.py"
CUT_POINTS: Final = "system/test_cut_points.py"
ANY_NODE: Final = "system/test_any_node.py"
PARTITION: Final = "system/test_partition.py"
SOCKET: Final = "system/test_socket.py"
STRANGERS: Final = f"{SOCKET}::test_somebody_elses_conversation_answers_like_one_that_does_not_exist"
TAKEOVER: Final = "system/test_takeover.py"

EPOCH_OF_MANY: Final = " AND epoch = c.epoch AND"
ANY_EPOCH: Final = " AND c.epoch > 0 AND"
OWN: Final = "c.user_id = $1"
ANYBODYS: Final = "$1::text IS NOT NULL"

MUTATIONS: Final = (
    # Whoever was an owner writes on.
    Mutation(
        "flush_one ignores the epoch",
        [Change(QUERIES, "t.epoch = $2 AND", "$2::integer > 0 AND")],
        [OWNERS, CRASHES, PARTITION],
    ),
    Mutation(
        "flush ignores the epoch",
        [Change(QUERIES, EPOCH_OF_MANY, ANY_EPOCH, within="-- name: flush\n")],
        [OWNERS, CRASHES, PARTITION],
    ),
    Mutation(
        "flush_with_endings ignores the epoch",
        [Change(QUERIES, EPOCH_OF_MANY, ANY_EPOCH, within="-- name: flush_with_endings\n")],
        [OWNERS, CRASHES, PARTITION],
    ),
    Mutation(
        "all flushes ignore the epoch",  # from outside, by nodes alone
        [
            Change(QUERIES, "t.epoch = $2 AND", "$2::integer > 0 AND"),
            Change(QUERIES, EPOCH_OF_MANY, ANY_EPOCH, within="-- name: flush\n"),
            Change(QUERIES, EPOCH_OF_MANY, ANY_EPOCH, within="-- name: flush_with_endings\n"),
        ],
        [CRASHES, PARTITION],
    ),
    Mutation(
        "renewing ignores the epoch",
        [Change(QUERIES, EPOCH_OF_MANY, ANY_EPOCH, within="-- name: renew\n")],
        [OWNERS],
    ),
    Mutation(
        "handing over ignores the epoch",
        [Change(QUERIES, EPOCH_OF_MANY, ANY_EPOCH, within="-- name: release\n")],
        [OWNERS],
    ),
    Mutation(
        "a takeover keeps the epoch",
        [Change(FOURTH, "t.epoch + 1 AS epoch", "t.epoch AS epoch")],
        [OWNERS, CRASHES],
    ),
    Mutation(
        "a takeover locks nothing",
        [Change(FOURTH, "        FOR NO KEY UPDATE SKIP LOCKED\n    LOOP", "    LOOP")],
        [OWNERS, CRASHES],
    ),
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
    Mutation(
        "a flush cannot be repeated",
        [Change(QUERIES, "    ON CONFLICT (conversation_id, seq) DO NOTHING\n", "", 3)],
        [OWNERS, PARTITION],
    ),
    # Admission.
    Mutation(
        "a message_id is not unique",  # only the look before the insertion is left
        [
            Change(FIRST, "CREATE UNIQUE INDEX messages_client_id", "CREATE INDEX messages_client_id"),
            Change(SECOND, "ON CONFLICT (user_id, client_id) WHERE client_id IS NOT NULL DO", "ON CONFLICT DO"),
            Change(THIRD, "ON CONFLICT (user_id, client_id) WHERE client_id IS NOT NULL DO", "ON CONFLICT DO"),
            Change(FIRST, "ON CONFLICT (user_id, client_id) WHERE client_id IS NOT NULL DO", "ON CONFLICT DO"),
        ],
        [f"{OWNERS}::test_a_message_that_two_nodes_admit_at_the_same_instant_is_admitted_once"],
    ),
    Mutation(
        "a message is not looked for before it is inserted",  # only the unique index is left
        [
            Change(
                THIRD,
                "m.client_id = p_client_id;\n\n    IF NOT FOUND THEN",
                "m.client_id = p_client_id AND false;\n\n    IF NOT FOUND THEN",
            )
        ],
        [f"{SOCKET}::test_a_repeated_message_shows_its_turn_again_and_is_stored_once", SOCKET],
    ),
    Mutation(
        "a conversation may have two running turns",
        [Change(FIRST, "CREATE UNIQUE INDEX turns_running", "CREATE INDEX turns_running")],
        [OWNERS],
    ),
    Mutation(
        "an admission does not look for a running turn",
        [
            Change(
                THIRD,
                "IF FOUND THEN\n                outcome := 'conversation_busy'",
                "IF false THEN\n                outcome := 'conversation_busy'",
            )
        ],
        [f"{SOCKET}::test_a_message_to_a_running_turn_is_refused_as_busy"],
    ),
    Mutation(
        "an admission does not lock the conversation",
        [
            Change(
                THIRD,
                "WHERE c.id = v_conversation_id AND c.user_id = p_user_id\n        FOR NO KEY UPDATE;",
                "WHERE c.id = v_conversation_id AND c.user_id = p_user_id;",
            )
        ],
        ["system/test_admission.py"],
    ),
    Mutation(
        "an admission ignores the order of roles",
        [Change(THIRD, "ELSIF last_role NOT IN ('assistant', 'system') OR v_has_calls THEN", "ELSIF false THEN")],
        [f"{SOCKET}::test_a_message_where_a_question_is_unanswered_is_refused_for_its_role_order"],
    ),
    Mutation(
        "a regeneration leaves the old answer as it was",
        [Change(THIRD, "UPDATE messages m SET status = 'superseded'", "UPDATE messages m SET status = m.status")],
        ["system/test_regenerate.py"],
    ),
    # Yours only.
    Mutation(
        "anybody may send to a conversation",
        [Change(THIRD, "c.id = v_conversation_id AND c.user_id = p_user_id\n", "c.id = v_conversation_id\n")],
        [STRANGERS],
    ),
    Mutation(
        "anybody may regenerate",
        [
            Change(
                THIRD,
                "c.id = p_conversation_id AND c.user_id = p_user_id\n",
                "c.id = p_conversation_id\n",
                within="INTO v_seq, anynode_regenerate.system_prompt",
            )
        ],
        [STRANGERS, "system/test_regenerate.py"],
    ),
    Mutation(
        "anybody may read events",
        [Change(QUERIES, OWN, ANYBODYS, within="-- name: read_events\n")],
        [STRANGERS],
    ),
    Mutation(
        "anybody may have a snapshot",
        [Change(QUERIES, OWN, ANYBODYS, within="-- name: snapshot\n")],
        [STRANGERS],
    ),
    Mutation(
        "anybody may cancel",
        [Change(QUERIES, OWN, ANYBODYS, within="-- name: request_cancel\n")],
        [STRANGERS],
    ),
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
        "a reading shows the cursor's event again",
        [
            Change(EVENTS, 'if row["seq"] > after]', 'if row["seq"] >= after]'),
            Change(EVENTS, "enumerate(events, after + 1)", "enumerate(events, events[0].seq)"),
        ],
        [CUT_POINTS],
    ),
    Mutation(
        "a cursor ahead of the journal is left to wait",
        [Change(EVENTS, 'is_broken = not found and after != rows[0]["last_seq"]', "is_broken = False")],
        [CUT_POINTS],
    ),
    Mutation(
        "a snapshot comes in place of the events that a reading has found",
        [Change(EVENTS, "is_broken = any(event.seq != seq for", "is_broken = any(event.seq != seq + 1 for")],
        [CUT_POINTS],
    ),
    Mutation(
        "a gap in what is read is not noticed",
        [Change(EVENTS, "is_broken = any(event.seq != seq for", "is_broken = any(event.seq < seq for")],
        ["database/test_events.py"],
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
    Mutation(
        "the horizon of a watch is the newest transaction",
        [Change(QUERIES, "SELECT pg_snapshot_xmin(", "SELECT pg_snapshot_xmax(")],
        [OWNERS],
    ),
    Mutation(
        "an admission is not marked for the watch of others",
        [
            Change(
                THIRD,
                "title = coalesce(title, p_title),\n                changed_xid = pg_current_xact_id()::text::bigint",
                "title = coalesce(title, p_title)",
            )
        ],
        [ANY_NODE],
    ),
    Mutation(
        "a regeneration is not marked for the watch of others",
        [
            Change(
                THIRD,
                "SET last_seq = v_seq + 1, updated_at = greatest(updated_at, p_created_at),\n"
                "            changed_xid = pg_current_xact_id()::text::bigint\n",
                "SET last_seq = v_seq + 1, updated_at = greatest(updated_at, p_created_at)\n",
            )
        ],
        ["system/test_regenerate.py"],
    ),
    # Messages without a turn, deletions, those who wait.
    Mutation(
        "messages are appended behind whatever comes last",
        [Change(THIRD, "ELSIF p_position <> coalesce(", "ELSIF false AND p_position <> coalesce(")],
        [MESSAGES],
    ),
    Mutation(
        "messages are appended while a turn runs",
        [
            Change("models/messages.py", '        if rows[0]["is_running"]:\n', "        if False:\n"),
            Change(
                THIRD, "ELSIF EXISTS (SELECT FROM turns t WHERE", "ELSIF false AND EXISTS (SELECT FROM turns t WHERE"
            ),
        ],
        [MESSAGES],
    ),
    Mutation(
        "an append is made again when its answer was lost",
        [
            Change(
                THIRD,
                "ELSIF EXISTS (SELECT FROM messages m WHERE m.id",
                "ELSIF false AND EXISTS (SELECT FROM messages m WHERE m.id",
            )
        ],
        ["system/test_rest_turns.py::test_a_write_whose_answer_is_lost_is_done_once"],
    ),
    Mutation(
        "anybody may append",
        [
            Change(
                THIRD,
                "c.id = p_conversation_id AND c.user_id = p_user_id\n",
                "c.id = p_conversation_id\n",
                within="SELECT c.last_seq INTO anynode_append.last_seq",
            ),
            Change(QUERIES, "WHERE c.id = $2 AND c.user_id = $1", "WHERE c.id = $2", within="-- name: read_tail\n"),
        ],
        ["system/test_rest.py"],
    ),
    Mutation(
        "anybody may read messages",
        [Change(QUERIES, "WHERE c.id = $2 AND c.user_id = $1", "WHERE c.id = $2", within="-- name: read_messages\n")],
        ["system/test_rest.py"],
    ),
    Mutation(
        "a deletion leaves the journal",
        [Change(THIRD, "    DELETE FROM events e WHERE e.conversation_id = p_conversation_id;\n", "")],
        ["system/test_rest_turns.py", "system/test_rest.py"],
    ),
    Mutation(
        "other nodes do not hear of a deletion",
        [
            Change(
                THIRD,
                "    INSERT INTO deletions (conversation_id) VALUES (p_conversation_id) ON CONFLICT DO NOTHING;\n",
                "",
            )
        ],
        ["system/test_sse.py", "system/test_rest_turns.py"],
    ),
    Mutation(
        "events of messages without a turn do not expire",
        [Change(QUERIES, "WHERE turn_id IS NULL AND written_at <", "WHERE false AND written_at <")],
        [MESSAGES],
    ),
    Mutation(
        "who waits for a turn is not told of a drain",
        [Change(NODE, "        self.drained.set()\n", "")],
        ["system/test_rest_turns.py"],
    ),
    # Takeover, cancel, drain.
    Mutation(
        "a takeover ignores that a cancel was asked for",
        [Change(LEASES, "        if taken.cancel_requested:\n", "        if False:\n")],
        [f"{CRASHES}::test_a_cancel_that_was_asked_for_while_the_node_was_dead_is_honoured", TAKEOVER],
    ),
    Mutation(
        "a takeover forgets what was said before a cancel",
        [Change(FOURTH, "(p_standing) OR cancel_requested OR is_exhausted)", "(p_standing) OR is_exhausted)")],
        [f"{CRASHES}::test_what_a_dead_node_said_is_kept_when_its_turn_is_cancelled"],
    ),
    Mutation(
        "a turn may be attempted for ever",
        [Change(LEASES, "elif taken.is_exhausted:", "elif False:")],
        [f"{CRASHES}::test_a_turn_that_kills_its_nodes_fails_after_the_last_attempt_and_the_next_message_works"],
    ),
    Mutation(
        "a turn that is handed over has been attempted once more",
        [Change(FOURTH, "CASE WHEN t.lease_expires_at = '-infinity' THEN 0 ELSE 1 END", "1")],
        ["system/test_handed_over.py"],
    ),
    Mutation(
        "a node does not find the turns that it does not know to be its own",
        [Change(FOURTH, "OR (t.node = p_node AND NOT", "OR (false AND NOT")],
        ["system/test_own_takeover.py"],
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
            Change(NODE, "for turn_id in news.to_cancel:", "for turn_id in ():"),
            Change(LEASES, 'return "cancel" if cancel_requested else "keep"', 'return "keep"'),
        ],
        ["system/test_cancel.py"],
    ),
    Mutation(
        "a drain does not hand its turns over",
        [Change(NODE, "                await self._leases.release(left)\n", "")],
        [f"{CRASHES}::test_a_turn_that_outlasts_the_drain_is_handed_over_at_once", "system/test_drain.py"],
    ),
    Mutation(
        "a node that drains admits messages",
        [
            Change(NODE, "        self.draining.set()\n", ""),
            Change("server/app.py", "        self.node.draining.set()\n", ""),
        ],
        [f"{CRASHES}::test_a_draining_node_admits_nothing_and_says_so", "system/test_drain.py"],
    ),
    Mutation(
        "a node that drains takes turns over",
        [Change(NODE, "        self._leases.may_take_over = False\n", "")],
        ["system/test_leases.py"],
    ),
    # Postgres.
    Mutation(
        "a connection is kept whose statement was given up",
        [
            Change(
                "models/database.py",
                "            connection.terminate()\n        raise\n",
                "            pass\n        raise\n",
            )
        ],
        [f"{CRASHES}::test_the_pool_recovers_wholly_from_a_stall"],
    ),
    Mutation(
        "the AI SDK is not told what a takeover takes back",
        [Change(CHUNKS, "if len(standing) == step.said and not step.unanswered:", "if True:")],
        ["unit/api/ai_sdk/test_fold.py", "system/test_ai_sdk_socket.py"],
    ),
    Mutation(
        "a resume over HTTP shows what was taken back",
        [Change(CHUNKS, "                del shown[step_at:]\n", "")],
        ["unit/api/ai_sdk/test_fold.py", "system/test_ai_sdk_http.py"],
    ),
    Mutation(
        "a stream goes on over what it has shown and a takeover takes back",
        [Change(CHUNK_STREAM, "if chunks.takes_back:", "if False:")],
        ["system/test_ai_sdk_http.py"],
    ),
    Mutation(
        "a stream that is cut ends as if it were whole",
        [Change("server/transport/sse.py", "if not is_whole:", "if False:")],
        ["system/test_ai_sdk_http.py"],
    ),
    Mutation(
        "resuming twice stops the turn",
        [Change(AI_SDK_CONNECTION, "if not shown.is_resumed:", "if True:")],
        ["system/test_ai_sdk_socket.py"],
    ),
    Mutation(
        "what begins between the look and the waiting is missed",
        [
            Change(WAITING, "conversation_id, last_seq, is_own=True", "conversation_id, None, is_own=True"),
            Change(WAITING, "await anext(steps)", "await anext(steps), await anext(steps)"),
        ],
        ["system/test_ai_sdk_waiting.py"],
    ),
    Mutation(
        "a turn goes on whose client stops it and waits for the next one",
        [Change(AI_SDK_CONNECTION, "        await self._stop_now(frame.id)  # else", "        pass  # else")],
        ["system/test_ai_sdk_waiting.py"],
    ),
    Mutation(
        "a resume after a sequence number repeats that chunk",
        [Change(AI_SDK_CONNECTION, "if sequence > after:", "if sequence >= after:")],
        ["system/test_ai_sdk_socket.py"],
    ),
    Mutation(
        "who has stopped a turn interrupts the next one",
        [Change(NODE, "admission.turn_id == stopped", "stopped is not None")],
        ["system/test_ai_sdk_socket.py"],
    ),
    Mutation(
        "a message that was sent can be changed without a word",
        [Change("server/api/ai_sdk/questions.py", "sent is not None and sent.content != question.text", "False")],
        ["system/test_ai_sdk_socket.py", "system/test_ai_sdk_http.py"],
    ),
    Mutation(
        "a chat's id is found among those of all users",
        [Change(FIFTH, "WHERE c.user_id = p_user_id AND c.client_id = p_chat_id", "WHERE c.client_id = p_chat_id")],
        ["system/test_ai_sdk_socket.py", "system/test_ai_sdk_http.py"],
    ),
    Mutation(
        "a ticket lets in again and again",
        [
            Change(
                QUERIES,
                "DELETE FROM tickets WHERE hash = $1 RETURNING user_id, token_expires_at,",
                "SELECT user_id, token_expires_at,",
                within="redeem_ticket",
            ),
            Change(QUERIES, "AS is_fresh;", "AS is_fresh FROM tickets WHERE hash = $1;", within="redeem_ticket"),
        ],
        ["system/test_tickets.py"],
    ),
    Mutation(
        "an old ticket lets in",
        [Change("models/tickets.py", 'if not rows or not rows[0]["is_fresh"]:', "if not rows:")],
        ["system/test_tickets.py"],
    ),
    Mutation(
        "frames of our own wire may be as long as the AI SDK's",
        [Change("server/serve.py", 'if event.path.partition("?")[0] == AI_SDK_PATH:', "if True:")],
        ["system/test_ai_sdk_socket.py", "system/test_socket.py"],
    ),
    Mutation(
        "a response that goes on repeats the event that it goes on after",
        [Change(RESPONSES, "if event.sequence_number > self._after", "if event.sequence_number >= self._after")],
        ["system/test_responses.py"],
    ),
    Mutation(
        "a response is found whoever asks",
        [Change(QUERIES, "WHERE t.id = $2 AND c.user_id = $1", "WHERE t.id = $2 AND $1::text IS NOT NULL")],
        ["system/test_responses.py"],
    ),
    Mutation(
        "what a tool call is called with depends on who stored it",
        [Change("server/api/openai/fold.py", '_plain(json.loads(text)), order="sorted"', "json.loads(text)")],
        ["unit/api/openai/test_fold.py"],
    ),
)


def paragraph(text: str, within: str) -> tuple[int, int]:
    """From where to where the only paragraph goes that has `within` in it; all of the text where that is empty."""
    if not within:
        return 0, len(text)
    if text.count(within) != 1:
        raise ValueError(f"{within!r} is there {text.count(within)} times")
    at = text.index(within)
    end = text.find("\n\n", at)
    return max(text.rfind("\n\n", 0, at), 0), len(text) if end < 0 else end


def changed(text: str, change: Change) -> str:
    """The text after a change. Raises ValueError where it does not apply."""
    start, end = paragraph(text, change.within)
    times = text.count(change.old, start, end)
    if times != change.times:
        raise ValueError(f"{change.old!r} is there {times} times, not {change.times}")
    return text[:start] + text[start:end].replace(change.old, change.new) + text[end:]


def broken(mutation: Mutation, top: Path) -> dict[str, str]:
    """The files of a copy that a mutation changes, as it leaves them. Raises ValueError where it does not apply."""
    files: dict[str, str] = {}
    for change in mutation.changes:
        try:
            files[change.file] = changed(files.get(change.file) or (top / change.file).read_text(), change)
        except (OSError, ValueError) as error:
            raise ValueError(f"{mutation.name}: {change.file}: {error}") from error
    return files


def copy_to(directory: Path) -> Path:
    """The files of the repository as they are, those not yet committed included, without what git ignores."""
    listing = ["git", "-c", f"safe.directory={TOP}", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(listing, cwd=TOP, check=True, capture_output=True, text=True)  # noqa: S603
    for name in filter(None, listed.stdout.split("\0")):
        if (TOP / name).is_file() or (TOP / name).is_symlink():  # the two links of anynode/
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(TOP / name, directory / name, follow_symlinks=False)
    return directory


class Run(NamedTuple):
    """What became of tests: the first red one; "" where none is, None where they could not be run."""

    red: str | None
    output: str


def run(top: Path, tests: Sequence[str], seconds_max: float, *options: str) -> Run:
    """Run tests of a copy, with the product beside them."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "0",
        "-q",
        "--tb=short",
        "-rfE",
        "-p",
        "no:cacheprovider",
        *options,
    ]
    process = subprocess.Popen(  # noqa: S603
        [*command, *(f"tests/{test}" for test in tests)],
        cwd=top,
        env={**os.environ, "PYTHONPATH": str(top), "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds_max)
    except subprocess.TimeoutExpired:
        return Run(f"{' '.join(tests)} (not done after {seconds_max:g} s)", stop(process))
    except BaseException:
        stop(process)
        raise
    if process.returncode == 0:
        return Run("", output)
    found = RED.search(output)
    return Run(None if found is None or process.returncode != 1 else found[1], output)


def stop(process: subprocess.Popen[str]) -> str:
    """End a run as Ctrl-C does, so that it stops what it has started; or all of it at once where it does not end."""
    process.terminate()
    try:
        return process.communicate(timeout=CLEANING_UP_SECONDS)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0]


def try_out(mutation: Mutation, top: Path) -> str:
    """By which test of a copy the mutation is noticed; "" when by none. Raises RuntimeError where one cannot be run."""
    for file, text in broken(mutation, top).items():
        (top / file).write_text(text)
    for test in mutation.tests:
        red, output = run(top, [test], SECONDS_MAX, "-x")
        if red is None:
            raise RuntimeError(f"{mutation.name}: {test} could not be run\n{output}")
        if red:
            return red
    return ""


def chosen(names: Sequence[str]) -> list[Mutation]:
    """The mutations with one of these in their names; all without any."""
    found = [mutation for mutation in MUTATIONS if not names or any(name in mutation.name for name in names)]
    if not found:
        raise SystemExit("there is no such mutation: see --list")
    return found


def main() -> int:
    """Try the mutations out, and say which of them survived."""
    parser = argparse.ArgumentParser(description="Break the product, and see that the tests notice.")
    parser.add_argument("names", nargs="*", help="parts of the names of mutations")
    parser.add_argument("--list", action="store_true", help="list the mutations")
    arguments = parser.parse_args()
    mutations = chosen(arguments.names)
    if arguments.list:
        print(*(mutation.name for mutation in mutations), sep="\n")
        return 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        return try_all(mutations, Path(scratch))


def try_all(mutations: Sequence[Mutation], scratch: Path) -> int:
    """The exit status: 0 when all have been noticed."""
    original = copy_to(scratch / "original")  # others may be working on the files meanwhile
    no_longer = []
    for mutation in mutations:
        try:
            broken(mutation, original)
        except ValueError as error:
            no_longer.append(str(error))
    if no_longer:
        print("no longer applies:", *no_longer, sep="\n")
        return 1

    tests = {test for mutation in mutations for test in mutation.tests}
    tests -= {test for test in tests if "::" in test and test.split("::")[0] in tests}
    red, output = run(
        shutil.copytree(original, scratch / "unchanged", symlinks=True), sorted(tests), SECONDS_MAX_UNCHANGED
    )
    if red != "":
        print(output, "the tests are not green to begin with", sep="\n")
        return 1
    print(f"unchanged, all is green: {output.strip().splitlines()[-1]}\n", flush=True)

    survived = 0
    width = max(len(mutation.name) for mutation in mutations)
    for mutation in mutations:
        began_at = time.monotonic()
        top = shutil.copytree(original, scratch / "broken", symlinks=True)
        red = try_out(mutation, top)
        shutil.rmtree(top)
        survived += not red
        print(f"{mutation.name:{width}}  {time.monotonic() - began_at:4.0f} s  {red or 'SURVIVED'}", flush=True)
    print(f"\n{len(mutations)} mutations, {survived} survived")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
