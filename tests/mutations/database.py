"""Mutations of models/: statements, SQL functions, and what reads their rows."""

from __future__ import annotations

from typing import Final

from tests.mutations.mutation import Change, Mutation

EVENTS: Final = "models/events.py"
QUERIES: Final = "models/queries.sql"
FIRST: Final = "models/migrations/0001_initial.py"
# A change of a function's file takes effect because migration 0006 or a later one loads it.
ADMIT: Final = "models/functions/admit_message.sql"
ANSWER: Final = "models/functions/answer_question.sql"
APPEND: Final = "models/functions/append_messages.sql"
CHAT: Final = "models/functions/chat.sql"
DELETE: Final = "models/functions/delete.sql"
TAKE_OVER: Final = "models/functions/take_over.sql"

MESSAGES: Final = "system/test_rest_messages.py"
OWNERS: Final = "database/test_turns.py"
CRASHES: Final = "system/test_crashes.py"
CUT_POINTS: Final = "system/test_cut_points.py"
ANY_NODE: Final = "system/test_any_node.py"
PARTITION: Final = "system/test_partition.py"
SOCKET: Final = "system/test_socket.py"
USERS: Final = "database/test_users.py"
STRANGERS: Final = f"{SOCKET}::test_somebody_elses_conversation_answers_like_one_that_does_not_exist"

EPOCH_OF_MANY: Final = " AND epoch = c.epoch AND"
ANY_EPOCH: Final = " AND c.epoch > 0 AND"
OWN: Final = "c.user_id = :user_id"
ANYBODYS: Final = ":user_id::text IS NOT NULL"

MUTATIONS: Final = (
    # A former owner goes on writing.
    Mutation(
        "flush_one ignores the epoch",
        [Change(QUERIES, "t.epoch = :epoch AND", ":epoch::integer > 0 AND")],
        [OWNERS, CRASHES, PARTITION],
    ),
    Mutation(
        "flush and flush_with_endings ignore the epoch",
        [Change(QUERIES, EPOCH_OF_MANY, ANY_EPOCH, within="-- fragment: append_events\n")],
        [OWNERS, CRASHES, PARTITION],
    ),
    Mutation(
        "all flushes ignore the epoch",  # from outside, by nodes alone
        [
            Change(QUERIES, "t.epoch = :epoch AND", ":epoch::integer > 0 AND"),
            Change(QUERIES, EPOCH_OF_MANY, ANY_EPOCH, within="-- fragment: append_events\n"),
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
        [Change(TAKE_OVER, "t.epoch + 1 AS epoch", "t.epoch AS epoch")],
        [OWNERS, CRASHES],
    ),
    Mutation(
        "a takeover locks nothing",
        [Change(TAKE_OVER, "        FOR NO KEY UPDATE SKIP LOCKED\n    LOOP", "    LOOP")],
        [OWNERS, CRASHES],
    ),
    # Commit, then deliver.
    Mutation(
        "a flush cannot be repeated",
        [Change(QUERIES, "    ON CONFLICT (conversation_id, seq) DO NOTHING\n", "", 2)],
        [OWNERS, PARTITION],
    ),
    # Admission.
    Mutation(
        "a message_id is not unique",  # only the look before the insertion is left
        [
            Change(FIRST, "CREATE UNIQUE INDEX messages_client_id", "CREATE INDEX messages_client_id"),
            Change(ADMIT, "ON CONFLICT (user_id, client_id) WHERE client_id IS NOT NULL DO", "ON CONFLICT DO"),
        ],
        [f"{OWNERS}::test_a_message_that_two_nodes_admit_at_the_same_instant_is_admitted_once"],
    ),
    Mutation(
        "a message is not looked for before it is inserted",  # only the unique index is left
        [
            Change(
                ADMIT,
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
                ADMIT,
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
                ADMIT,
                "WHERE c.id = v_conversation_id AND c.user_id = p_user_id\n        FOR NO KEY UPDATE;",
                "WHERE c.id = v_conversation_id AND c.user_id = p_user_id;",
            )
        ],
        ["system/test_admission.py"],
    ),
    Mutation(
        "an admission ignores the order of roles",
        [Change(ADMIT, "ELSIF last_role NOT IN ('assistant', 'system') OR v_has_calls THEN", "ELSIF false THEN")],
        [f"{SOCKET}::test_a_message_where_a_question_is_unanswered_is_refused_for_its_role_order"],
    ),
    Mutation(
        "a regeneration leaves the old answer as it was",
        [Change(ANSWER, "UPDATE messages m SET status = 'superseded'", "UPDATE messages m SET status = m.status")],
        ["system/test_regenerate.py"],
    ),
    Mutation(
        "a question that was answered is answered again",
        [Change(ANSWER, "IF p_is_unanswered AND (", "IF false AND (")],
        ["system/test_rest_appended.py"],
    ),
    Mutation(
        "a title is made of an answer",
        [Change(APPEND, "WHERE n.role = 'user' ORDER", "ORDER")],
        ["system/test_rest_appended.py"],
    ),
    Mutation(
        "a conversation is made before its new user",
        [Change(QUERIES, "FROM (SELECT count(*) FROM known) AS users_first, room", "FROM room")],
        ["database/test_conversations.py"],
    ),
    # Yours only.
    Mutation(
        "anybody's conversation is found by our id of it",
        [
            Change(
                QUERIES, "AND user_id = :user_id),", "AND :user_id::text <> ''),", within="-- name: find_conversation\n"
            )
        ],
        ["system/test_rest.py"],
    ),
    Mutation(
        "anybody may send to a conversation",
        [Change(ADMIT, "c.id = v_conversation_id AND c.user_id = p_user_id\n", "c.id = v_conversation_id\n")],
        [STRANGERS],
    ),
    Mutation(
        "anybody may regenerate",
        [
            Change(
                ANSWER,
                "c.id = p_conversation_id AND c.user_id = p_user_id\n",
                "c.id = p_conversation_id\n",
                within="INTO v_seq, anynode_answer_question.system_prompt",
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
    # Following.
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
        "the horizon of a watch is the newest transaction",
        [Change(QUERIES, "SELECT pg_snapshot_xmin(", "SELECT pg_snapshot_xmax(")],
        [OWNERS],
    ),
    Mutation(
        "an admission is not marked for the watch of others",
        [
            Change(
                ADMIT,
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
                ANSWER,
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
        [Change(APPEND, "ELSIF p_position <> coalesce(", "ELSIF false AND p_position <> coalesce(")],
        [MESSAGES],
    ),
    Mutation(
        "messages are appended while a turn runs",
        [
            Change("models/messages.py", '        if rows[0]["is_running"]:\n', "        if False:\n"),
            Change(
                APPEND, "ELSIF EXISTS (SELECT FROM turns t WHERE", "ELSIF false AND EXISTS (SELECT FROM turns t WHERE"
            ),
        ],
        [MESSAGES],
    ),
    Mutation(
        "an append is made again when its answer was lost",
        [
            Change(
                APPEND,
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
                APPEND,
                "c.id = p_conversation_id AND c.user_id = p_user_id\n",
                "c.id = p_conversation_id\n",
                within="SELECT c.last_seq INTO anynode_append_messages.last_seq",
            ),
            Change(
                QUERIES,
                "WHERE c.id = :conversation_id AND c.user_id = :user_id",
                "WHERE c.id = :conversation_id AND :user_id <> ''",
                within="-- name: read_tail\n",
            ),
        ],
        ["system/test_rest.py"],
    ),
    Mutation(
        "anybody may read messages",
        [
            Change(
                QUERIES,
                "WHERE c.id = :conversation_id AND c.user_id = :user_id",
                "WHERE c.id = :conversation_id AND :user_id <> ''",
                within="-- name: read_messages\n",
            )
        ],
        ["system/test_rest.py"],
    ),
    Mutation(
        "a deletion leaves the journal",
        [Change(DELETE, "    DELETE FROM events e WHERE e.conversation_id = p_conversation_id;\n", "")],
        ["system/test_rest_turns.py", "system/test_rest.py"],
    ),
    Mutation(
        "other nodes do not hear of a deletion",
        [
            Change(
                DELETE,
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
    # Takeover, cancel, drain.
    Mutation(
        "a takeover forgets what was said before a cancel",
        [Change(TAKE_OVER, "(p_standing) OR cancel_requested OR", "(p_standing) OR")],
        [f"{CRASHES}::test_what_a_dead_node_said_is_kept_when_its_turn_is_cancelled"],
    ),
    Mutation(
        "a turn that is handed over has been attempted once more",
        [Change(TAKE_OVER, "CASE WHEN t.lease_expires_at = '-infinity' THEN 0 ELSE 1 END", "1")],
        ["system/test_handed_over.py"],
    ),
    Mutation(
        "a node does not find the turns that it does not know to be its own",
        [Change(TAKE_OVER, "OR (t.node = p_node AND NOT", "OR (false AND NOT")],
        ["system/test_own_takeover.py"],
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
        "a chat's id is found among those of all users",
        [Change(CHAT, "WHERE c.user_id = p_user_id AND c.client_id = p_chat_id", "WHERE c.client_id = p_chat_id")],
        ["system/test_ai_sdk_socket.py", "system/test_ai_sdk_http.py"],
    ),
    Mutation(
        "a ticket lets in again and again",
        [
            Change(
                QUERIES,
                "DELETE FROM tickets t WHERE hash = :hash\nRETURNING user_id, token_expires_at,",
                "SELECT user_id, token_expires_at,",
                within="redeem_ticket",
            ),
            Change(
                QUERIES, "AS is_revoked;", "AS is_revoked FROM tickets t WHERE hash = :hash;", within="redeem_ticket"
            ),
        ],
        ["system/test_tickets.py"],
    ),
    Mutation(
        "an old ticket lets in",
        [Change("models/tickets.py", 'or not rows[0]["is_fresh"]', "")],
        ["database/test_revocations.py", "system/test_tickets.py"],
    ),
    Mutation(
        "a ticket outlives its token",
        [Change(QUERIES, "token_expires_at > extract(epoch FROM clock_timestamp())", "true", within="redeem_ticket")],
        ["database/test_revocations.py"],
    ),
    Mutation(
        "a ticket outlives the revocation of its token",
        [Change("models/tickets.py", ' or rows[0]["is_revoked"]', "")],
        ["database/test_revocations.py"],
    ),
    Mutation(
        "a revocation that is repeated is not heard of",
        [Change(QUERIES, ", changed_xid = excluded.changed_xid", "", within="-- name: revoke")],
        ["database/test_revocations.py"],
    ),
    Mutation(
        "a deleted user leaves no revocation",
        [
            Change("models/functions/revoke_deleted.sql", "AFTER DELETE ON users", "AFTER TRUNCATE ON users"),
            Change("models/functions/revoke_deleted.sql", "FOR EACH ROW EXECUTE", "FOR EACH STATEMENT EXECUTE"),
        ],
        ["database/test_revocations.py"],
    ),
    Mutation(
        "the address of a revoked token makes a deleted user again",
        [Change(QUERIES, "'UTF8')), 'hex')), 0) <= n.issued_at", "'UTF8')), 'hex')), 0) <= n.issued_at + 1e10")],
        [USERS],
    ),
    Mutation(
        "a response is found for anybody",
        [
            Change(
                QUERIES,
                "WHERE t.id = :turn_id AND c.user_id = :user_id",
                "WHERE t.id = :turn_id AND :user_id::text IS NOT NULL",
            )
        ],
        ["system/test_responses.py"],
    ),
    # Users.
    Mutation(
        "addresses are written in any order, so that two nodes may wait for each other",
        [Change(QUERIES, "\nORDER BY n.id\n", "\n")],
        [USERS],
    ),
    Mutation(
        "a user who has a conversation by now makes the command fail",
        [Change("models/users.py", "except asyncpg.ForeignKeyViolationError:", "except asyncpg.UniqueViolationError:")],
        [USERS],
    ),
    Mutation(
        "a forgotten user's tickets are everybody's",
        [
            Change(
                QUERIES,
                "DELETE FROM tickets WHERE user_id = :user_id RETURNING hash",
                "DELETE FROM tickets RETURNING hash",
            )
        ],
        [USERS, "system/test_forget.py"],
    ),
)
