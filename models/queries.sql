-- The statements of the serving path, by name. Each is one round trip. Every write may be repeated with the same
-- arguments when its outcome is unknown. Plans are guarded by tests/database/test_plans.py.
--
-- `:name` is a parameter. "-- include: x" stands for the text of "-- fragment: x". models/queries.py reads both.

-- name: admit
-- Admit a user's message, and begin its turn: ownership, repetition, one turn at a time and role order are checked, the
-- message, the turn and their events are inserted, and the history is read. See models/functions/admit_message.sql.
SELECT * FROM anynode_admit_message(:user_id, :conversation_id, :new_conversation_id, :title, :message_id, :client_message_id, :content, :created_at,
    :turn_id, :node, :lease_seconds, :message_created, :turn_started, :history_messages_max, :limits);

-- name: admit_to_chat
-- Admit a message to a conversation that goes by a client's own id, which is made where there is none. See
-- models/functions/admit_chat_message.sql.
SELECT * FROM anynode_admit_chat_message(:user_id, :client_chat_id, :conversation_id, :new_conversation_id, :title, :message_id, :client_message_id,
    :content, :created_at, :turn_id, :node, :lease_seconds, :message_created, :turn_started, :history_messages_max,
    :limits);

-- name: regenerate
-- Begin a turn that answers the last question again; its old answer is superseded. See
-- models/functions/answer_question.sql.
SELECT * FROM anynode_answer_question(:user_id, :conversation_id, :client_message_id, false, :turn_id, :created_at,
                                      :node, :lease_seconds, :history_messages_max, :limits);

-- name: answer
-- Begin a turn that answers the last message, a question that has no answer yet. See
-- models/functions/answer_question.sql.
SELECT * FROM anynode_answer_question(:user_id, :conversation_id, NULL, true, :turn_id, :created_at, :node,
                                      :lease_seconds, :history_messages_max, :limits);

-- fragment: append_events
-- Append events of many turns. A turn whose epoch is stale, or that has ended, is not in `owned`: it is refused as a
-- whole, in the statement that writes. Turn ids are passed as text, and an event names its turn by the turn's number
-- among them: asyncpg is slow at arrays of UUIDs. Turns are locked in the order of their ids, as in `renew`, so that
-- two statements never wait for each other. Each turn is looked up by its id. A plan is kept for long, and one that
-- joins could be quadratic: it was made when `turns` was small. `finished_at IS NULL` means the same as `status =
-- 'running'`, but the planner cannot choose the partial index `turns_running` for it.
WITH claims AS (
    SELECT * FROM unnest(:turn_ids::text[]::uuid[], :epochs::integer[])
        WITH ORDINALITY AS claim (turn_id, epoch, number)
), owned AS MATERIALIZED (
    SELECT t.id, t.conversation_id, t.epoch, c.number
    FROM (SELECT * FROM claims ORDER BY turn_id) c CROSS JOIN LATERAL (
        SELECT id, conversation_id, epoch FROM turns
        WHERE id = c.turn_id AND epoch = c.epoch AND finished_at IS NULL
        FOR NO KEY UPDATE
    ) t
), appended AS (
    INSERT INTO events (conversation_id, seq, turn_id, epoch, type, payload)
    SELECT o.conversation_id, e.seq, o.id, o.epoch, e.type, e.payload
    FROM unnest(:event_turns::integer[], :event_seqs::bigint[], :event_types::text[], :event_payloads::jsonb[])
        AS e (number, seq, type, payload)
    JOIN owned o ON o.number = e.number
    ON CONFLICT (conversation_id, seq) DO NOTHING
)

-- name: flush
-- Append what the turns of a node have said, and return the turns that were refused.
-- include: append_events
SELECT turn_id FROM claims WHERE turn_id NOT IN (SELECT id FROM owned);

-- name: flush_with_endings
-- Append what the turns of a node have said, where some of them end. Their messages, their status and the
-- conversation's last_seq are committed in the same statement, and their cost is counted towards their users' limits.
-- The turns that were refused are returned. See models/functions/settle.sql, which returns no row.
-- include: append_events
, said AS (
    INSERT INTO messages (id, conversation_id, user_id, position, role, content, tool_calls, tool_name,
                          tool_call_id, turn_id, status, created_at)
    SELECT m.id, o.conversation_id, m.user_id,
           m.number + (SELECT max(position) FROM messages WHERE conversation_id = o.conversation_id),
           m.role, m.content, m.tool_calls, m.tool_name, m.tool_call_id, o.id, m.status, m.created_at
    FROM unnest(:message_turn_ids::uuid[], :message_ids::uuid[], :user_ids::text[], :numbers::integer[],
                :roles::text[], :contents::text[], :tool_calls::jsonb[], :tool_names::text[], :tool_call_ids::text[],
                :message_statuses::text[], :created_ats::timestamptz[])
        AS m (turn_id, id, user_id, number, role, content, tool_calls, tool_name, tool_call_id, status, created_at)
    JOIN owned o ON o.id = m.turn_id
    RETURNING user_id, octet_length(content) + coalesce(octet_length(tool_calls::text), 0) AS bytes
), ended AS (
    UPDATE turns t
    SET status = e.status, error = e.error, usage = e.usage, finished_at = clock_timestamp()
    FROM unnest(:ended_turn_ids::uuid[], :statuses::text[], :errors::jsonb[], :usages::jsonb[])
        AS e (turn_id, status, error, usage)
    JOIN owned o ON o.id = e.turn_id
    WHERE t.id = o.id
), counted AS (
    UPDATE conversations c
    SET last_seq = e.last_seq
    FROM unnest(:ended_turn_ids::uuid[], :last_seqs::bigint[], :tokens::bigint[]) AS e (turn_id, last_seq, tokens)
    JOIN owned o ON o.id = e.turn_id
    WHERE c.id = o.conversation_id
    RETURNING c.user_id, e.tokens
), spent AS MATERIALIZED (
    SELECT user_id, tokens, 0 AS bytes FROM counted UNION ALL SELECT user_id, 0, bytes FROM said
)
SELECT turn_id FROM claims WHERE turn_id NOT IN (SELECT id FROM owned)
UNION ALL
SELECT anynode_settle((SELECT array_agg(user_id) FROM spent), (SELECT array_agg(tokens) FROM spent),
                      (SELECT array_agg(bytes) FROM spent));

-- name: flush_one
-- Append one event of one turn, and return the turn if it was refused. Without arrays the plan is made once and kept;
-- with them it is made for every call.
WITH owned AS MATERIALIZED (
    SELECT t.id, t.conversation_id, t.epoch FROM turns t
    WHERE t.id = :turn_id AND t.epoch = :epoch AND t.status = 'running'
    FOR NO KEY UPDATE
), appended AS (
    INSERT INTO events (conversation_id, seq, turn_id, epoch, type, payload)
    SELECT o.conversation_id, :seq, o.id, o.epoch, :type, :payload FROM owned o
    ON CONFLICT (conversation_id, seq) DO NOTHING
)
SELECT :turn_id::uuid AS turn_id WHERE NOT EXISTS (SELECT FROM owned);

-- name: turn_states
-- Read the states of refused turns. One that ended under the epoch that claimed it was not lost: its flush was
-- repeated.
SELECT id, epoch, status FROM turns WHERE id = ANY (:turn_ids::uuid[]);

-- name: read_events
-- Read the journal from a cursor on, the cursor's own event included, without its payload. One row with a null seq: there
-- is no such event. There are at most `events_max`; the last one is the one whose payload fills `bytes_max`, if one does.
-- `bytes` are those of the payloads up to and with the event. The text of a payload is made once, to be counted and sent.
SELECT c.last_seq, e.seq, e.turn_id::text AS turn_id, e.type, e.payload, e.bytes, t.id IS NOT NULL AS is_running
FROM conversations c
LEFT JOIN turns t ON t.conversation_id = c.id AND t.status = 'running'
LEFT JOIN LATERAL (
    SELECT * FROM (
        SELECT *, sum(octet_length(payload)) OVER (ORDER BY seq ROWS UNBOUNDED PRECEDING) AS bytes
        FROM (
            SELECT seq, turn_id, type, CASE WHEN seq > :cursor THEN payload::text ELSE '' END AS payload FROM events
            WHERE conversation_id = c.id AND seq >= :cursor ORDER BY seq LIMIT :events_max
        ) next
    ) counted
    WHERE bytes - octet_length(payload) < :bytes_max
) e ON true
WHERE c.id = :conversation_id AND c.user_id = :user_id
ORDER BY e.seq;

-- name: read_running
-- Read the journals of many conversations in which turns run on other nodes, each from its cursor on as `read_events`
-- does, and whether the lease of the running turn has run out. A payload that takes more than `payload_bytes_max` as it
-- is stored is only there for the first new event, so that `events_max` bounds the bytes too: a sum over the events, as
-- `read_events` has it, would cost a fifth more, twenty times a second. Each conversation and turn is looked up
-- (LIMIT 1) for the reason that `append_events` gives.
SELECT w.number, c.last_seq, e.seq, e.turn_id::text AS turn_id, e.type, e.payload, t.id IS NOT NULL AS is_running,
       coalesce(t.lease_expires_at < clock_timestamp(), false) AS has_lapsed
FROM unnest(:conversation_ids::text[]::uuid[], :cursors::bigint[])
    WITH ORDINALITY AS w (conversation_id, cursor, number)
LEFT JOIN LATERAL (SELECT last_seq FROM conversations WHERE id = w.conversation_id LIMIT 1) c ON true
LEFT JOIN LATERAL (
    SELECT id, lease_expires_at FROM turns WHERE conversation_id = w.conversation_id AND status = 'running' LIMIT 1
) t ON true
LEFT JOIN LATERAL (
    SELECT seq, turn_id, type,
           CASE WHEN seq = w.cursor + 1 OR (seq > w.cursor AND pg_column_size(payload) <= :payload_bytes_max)
                THEN payload END AS payload
    FROM events WHERE conversation_id = w.conversation_id AND seq >= w.cursor ORDER BY seq LIMIT :events_max
) e ON true
ORDER BY w.number, e.seq;

-- name: watch
-- Read what a node must hear of: its turns that are to be cancelled, the conversations in which turns have begun, or
-- that were deleted, and revocations, since the horizon of an earlier watch (null: none). All transactions before a
-- horizon have ended, so no change is missed; some are reported twice. After a restore from another cluster, rows may
-- carry later transactions; the upper bound skips them.
SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint AS horizon,
       ARRAY(SELECT id FROM turns WHERE node = :node AND status = 'running' AND cancel_requested_at IS NOT NULL)
           AS cancelled,
       changed.ids, changed.last_seqs, revoked.hashes, revoked.not_befores
FROM (
    SELECT array_agg(c.id) AS ids, array_agg(c.last_seq) AS last_seqs
    FROM ((SELECT id, last_seq FROM conversations
           WHERE changed_xid >= :horizon AND changed_xid < pg_snapshot_xmax(pg_current_snapshot())::text::bigint
           ORDER BY changed_xid DESC LIMIT :changes_max)
          UNION ALL
          (SELECT conversation_id, 9223372036854775807 FROM deletions
           WHERE changed_xid >= :horizon AND changed_xid < pg_snapshot_xmax(pg_current_snapshot())::text::bigint
           ORDER BY changed_xid DESC LIMIT :changes_max)) c
) changed, (
    SELECT array_agg(r.user_hash) AS hashes, array_agg(r.not_before) AS not_befores
    FROM (SELECT user_hash, not_before FROM revocations
          WHERE changed_xid >= :horizon AND changed_xid < pg_snapshot_xmax(pg_current_snapshot())::text::bigint
          ORDER BY changed_xid DESC LIMIT :changes_max) r
) revoked;

-- name: snapshot
-- Read the newest messages, the running turn with its text so far, and the cursor, all of one instant. There are at most
-- `messages_max` messages, and from the third on no more than `bytes_max` of content and calls. Positions begin with 1,
-- so the oldest of them says whether there are others.
WITH conversation AS (
    SELECT c.id, c.last_seq FROM conversations c WHERE c.id = :conversation_id AND c.user_id = :user_id
), running AS (
    SELECT t.id, t.conversation_id, t.first_seq FROM turns t JOIN conversation c ON t.conversation_id = c.id
    WHERE t.status = 'running'
), said AS (
    SELECT e.seq, e.type, e.payload ->> 'text' AS text
    FROM running r JOIN events e ON e.conversation_id = r.conversation_id AND e.seq >= r.first_seq
), newest AS (
    SELECT m.* FROM conversation c CROSS JOIN LATERAL (
        SELECT *, sum(octet_length(content) + coalesce(octet_length(tool_calls::text), 0)) OVER newest_first AS bytes,
               row_number() OVER newest_first AS number
        FROM (SELECT * FROM messages WHERE conversation_id = c.id ORDER BY position DESC LIMIT :messages_max) latest
        WINDOW newest_first AS (ORDER BY position DESC ROWS UNBOUNDED PRECEDING)
    ) m
    WHERE bytes <= :bytes_max OR number <= 2
)
SELECT greatest(c.last_seq, (SELECT max(seq) FROM said)) AS seq, (SELECT id FROM running) AS running_turn_id,
       (SELECT string_agg(text, '' ORDER BY seq) FROM said
        WHERE type IN ('turn.delta', 'turn.restarted')
          AND seq >= coalesce((SELECT max(seq) FROM said WHERE type = 'turn.restarted'), 0)) AS running_text,
       m.id, m.position, m.role, m.content, m.tool_calls, m.tool_name, m.tool_call_id, m.status, m.turn_id,
       m.created_at
FROM conversation c LEFT JOIN newest m ON true
ORDER BY m.position;

-- name: create_conversation
-- Make a conversation, and its user where that is new, if the user may store it: else the limit is named. See
-- models/functions/count.sql.
WITH room AS MATERIALIZED (
    SELECT * FROM anynode_count(:user_id, NULL, 1, :bytes, :limits)
), known AS (
    INSERT INTO users (id) SELECT :user_id FROM room WHERE refused_limit IS NULL ON CONFLICT DO NOTHING
), made AS (
    INSERT INTO conversations (id, user_id, title, system_prompt, metadata, created_at, updated_at)
    SELECT :conversation_id, :user_id, :title, :system_prompt, :metadata, :created_at, :created_at
    FROM room WHERE refused_limit IS NULL
    ON CONFLICT (id) DO UPDATE SET id = excluded.id
    RETURNING id, client_id, title, system_prompt, metadata, last_seq, created_at, updated_at
)
SELECT * FROM room LEFT JOIN made ON true;

-- name: get_or_create_conversation
-- Find the conversation that a client means by an id, or make one under `new_id`. There is always one row. Its id is null
-- where `new_id` is another user's conversation (`is_taken`), or where another transaction made the conversation at the
-- same instant: then the same statement again finds it. It is null, too, where the user may store no more. Users come before their conversations, as in
-- anynode_admit_chat_message, so that two transactions of a new user never wait for each other. See
-- models/functions/chat.sql and models/functions/count.sql.
WITH found AS MATERIALIZED (
    SELECT anynode_chat(:user_id, coalesce(:client_id, :wanted_id::uuid::text), :wanted_id) AS id,
           EXISTS (SELECT FROM conversations WHERE id = :new_id AND user_id <> :user_id) AS is_taken
), room AS MATERIALIZED (
    SELECT c.* FROM found CROSS JOIN LATERAL anynode_count(:user_id, NULL, 1, :bytes, :limits) c
    WHERE found.id IS NULL AND NOT is_taken
), known AS (
    INSERT INTO users (id) SELECT :user_id FROM room WHERE refused_limit IS NULL
    ON CONFLICT DO NOTHING
    RETURNING id
), made AS (
    INSERT INTO conversations (id, user_id, client_id, title, system_prompt, metadata, created_at, updated_at)
    SELECT :new_id, :user_id, :client_id, :title, :system_prompt, :metadata, :created_at, :created_at
    FROM (SELECT count(*) FROM known) AS users_first, room WHERE refused_limit IS NULL
    ON CONFLICT DO NOTHING
    RETURNING id, client_id, title, system_prompt, metadata, last_seq, created_at, updated_at
)
SELECT is_taken, refused_limit, retry_after_ms, c.*
FROM found LEFT JOIN room ON true LEFT JOIN (
    SELECT true AS is_new, * FROM made
    UNION ALL
    SELECT false, id, client_id, title, system_prompt, metadata, last_seq, created_at, updated_at FROM conversations
    WHERE user_id = :user_id AND id = (SELECT id FROM found)
) c ON true;

-- name: read_conversation
-- Read one conversation.
SELECT id, client_id, title, system_prompt, metadata, last_seq, created_at, updated_at FROM conversations
WHERE id = :conversation_id AND user_id = :user_id;

-- fragment: listed
-- List those of the conversations `looked_at` whose titles contain a text, or all (null). Where a search has not found
-- enough of them, add a row that is not listed: the place of the last title that it has looked at.
found AS MATERIALIZED (
    SELECT * FROM (
        SELECT *, sum(own_bytes) OVER (ORDER BY updated_at DESC, id DESC ROWS UNBOUNDED PRECEDING) AS bytes
        FROM (
            SELECT *, coalesce(octet_length(system_prompt), 0) + octet_length(metadata::text) AS own_bytes
            FROM looked_at
            WHERE :search::text IS NULL OR strpos(lower(title), lower(:search)) > 0
            ORDER BY updated_at DESC, id DESC LIMIT :conversations_max OFFSET :skip
        ) matching
    ) counted
    WHERE bytes - own_bytes < :bytes_max
)
SELECT true AS is_listed, id, client_id, title, system_prompt, metadata, last_seq, created_at, updated_at, bytes
FROM found
UNION ALL
SELECT false, id, NULL, NULL, NULL, NULL, NULL, NULL, updated_at, NULL
FROM (
    SELECT id, updated_at FROM looked_at
    ORDER BY updated_at DESC, id DESC OFFSET :looked_at_max::bigint - 1 LIMIT 1
) last_looked_at
WHERE :search IS NOT NULL AND (SELECT count(*) FROM found) < :conversations_max
ORDER BY is_listed DESC, updated_at DESC, id DESC;

-- name: list_conversations
-- List a user's conversations, newest activity first: those whose titles contain a text, or all (null). The newest
-- `looked_at_max` are looked at. Where a search finds fewer than `conversations_max` in as many titles, the last row is
-- not listed, and is the place of the last title. `bytes` are those of the prompts and metadata up to and with the row;
-- the row that fills `bytes_max` is the last one.
WITH looked_at AS NOT MATERIALIZED (
    SELECT id, client_id, title, system_prompt, metadata, last_seq, created_at, updated_at FROM conversations
    WHERE user_id = :user_id
    ORDER BY updated_at DESC, id DESC LIMIT :looked_at_max
),
-- include: listed

-- name: list_conversations_before
-- List a user's conversations as `list_conversations` does, from a place in the list on. It is as fast far down as at
-- the top.
WITH looked_at AS NOT MATERIALIZED (
    SELECT id, client_id, title, system_prompt, metadata, last_seq, created_at, updated_at FROM conversations
    WHERE user_id = :user_id AND (updated_at, id) < (:before_updated_at, :before_id)
    ORDER BY updated_at DESC, id DESC LIMIT :looked_at_max
),
-- include: listed

-- name: update_conversation
-- Set each field whose flag is true, if the user may store it: else the limit is named. `updated_at` stays: it is the
-- last activity. Conversations are locked before their users' usage, as everywhere. See
-- models/functions/count.sql.
WITH mine AS MATERIALIZED (
    SELECT id FROM conversations WHERE id = :conversation_id AND user_id = :user_id FOR NO KEY UPDATE
), room AS MATERIALIZED (
    SELECT mine.id AS conversation_id, c.* FROM mine CROSS JOIN LATERAL anynode_count(:user_id, NULL, 0, :bytes, :limits) c
), updated AS (
    UPDATE conversations
    SET title = CASE WHEN :sets_title THEN :title ELSE title END,
        system_prompt = CASE WHEN :sets_system_prompt THEN :system_prompt ELSE system_prompt END,
        metadata = CASE WHEN :sets_metadata THEN :metadata ELSE metadata END
    FROM room WHERE id = :conversation_id AND user_id = :user_id AND refused_limit IS NULL
    RETURNING id, client_id, title, system_prompt, metadata, last_seq, created_at, updated_at
)
SELECT refused_limit, retry_after_ms, updated.* FROM room LEFT JOIN updated ON true;

-- name: delete_conversation
-- Delete a conversation with its messages, turns and events; while a turn runs only if `is_forced`. See
-- models/functions/delete.sql.
SELECT outcome FROM anynode_delete(:user_id, :conversation_id, :is_forced);

-- name: read_tail
-- Read the last position, whether a turn runs, and the messages that decide which role may come next: the last one that
-- is no tool's result, and the results after it.
SELECT m.position, m.role, m.tool_calls, m.tool_call_id,
       EXISTS (SELECT FROM turns t WHERE t.conversation_id = c.id AND t.status = 'running') AS is_running
FROM conversations c LEFT JOIN LATERAL (
    SELECT position, role, tool_calls, tool_call_id FROM messages
    WHERE conversation_id = c.id AND position >= (
        SELECT position FROM messages WHERE conversation_id = c.id AND role <> 'tool' ORDER BY position DESC LIMIT 1)
    ORDER BY position
) m ON true
WHERE c.id = :conversation_id AND c.user_id = :user_id
ORDER BY m.position;

-- name: append
-- Append messages without a turn, if the last message is still the one at `position`. See models/functions/append_messages.sql.
SELECT * FROM anynode_append_messages(:user_id, :conversation_id, :position, :created_at, :ids, :roles, :contents,
                                      :tool_calls, :tool_names, :tool_call_ids, :payloads, :limits);

-- name: read_messages
-- Read the newest messages up to one of them (`before`, itself included; null: up to the end), newest first. There are
-- at most `messages_max`, and from the third on no more than `bytes_max` of content and calls. One row with a null id:
-- there are none. No row: not the user's conversation.
SELECT c.system_prompt, m.*
FROM conversations c LEFT JOIN LATERAL (
    SELECT * FROM (
        SELECT *, sum(octet_length(content) + coalesce(octet_length(tool_calls::text), 0)) OVER newest_first AS bytes,
               row_number() OVER newest_first AS number
        FROM (
            SELECT id, client_id, position, role, content, tool_calls, tool_name, tool_call_id, status, turn_id,
                   created_at
            FROM messages
            WHERE conversation_id = c.id AND (:with_superseded OR status <> 'superseded' OR id = :before)
                AND position <= coalesce(CASE WHEN :before::uuid IS NULL THEN 2147483647 ELSE
                    (SELECT position FROM messages WHERE id = :before AND conversation_id = c.id) END, 0)
            ORDER BY position DESC LIMIT :messages_max
        ) newest
        WINDOW newest_first AS (ORDER BY position DESC ROWS UNBOUNDED PRECEDING)
    ) counted
    WHERE bytes <= :bytes_max OR number <= 2
) m ON true
WHERE c.id = :conversation_id AND c.user_id = :user_id
ORDER BY m.position DESC;

-- name: read_turn
-- Read a turn and the messages that answered in it, in order. One row with a null id: there are none yet. They come
-- after the turn's question, and before the next one.
SELECT t.id AS turn_id, t.status, t.error, t.usage, t.created_at AS started_at, t.finished_at,
       m.id, m.role, m.content, m.tool_calls, m.tool_name, m.tool_call_id, m.status AS message_status, m.created_at
FROM conversations c
JOIN turns t ON t.conversation_id = c.id AND t.id = :turn_id
LEFT JOIN LATERAL (
    SELECT * FROM messages
    WHERE conversation_id = c.id AND turn_id = t.id AND role <> 'user' AND position > coalesce(t.position, 0)
        AND position < CASE WHEN t.position IS NULL THEN 2147483647 ELSE coalesce(
            (SELECT position FROM messages
             WHERE conversation_id = c.id AND position > t.position AND role = 'user'
             ORDER BY position LIMIT 1), 2147483647) END
) m ON true
WHERE c.id = :conversation_id AND c.user_id = :user_id
ORDER BY m.position;

-- name: renew
-- Renew the leases of a node's turns, and return which of them are to be cancelled. A turn that is missing from the
-- answer is no longer this node's. For the order of locks and the condition on `finished_at` see `append_events`.
WITH mine AS MATERIALIZED (
    SELECT t.id
    FROM (SELECT * FROM unnest(:turn_ids::uuid[], :epochs::integer[]) AS u (turn_id, epoch) ORDER BY turn_id) c
    CROSS JOIN LATERAL (
        SELECT id FROM turns WHERE id = c.turn_id AND epoch = c.epoch AND finished_at IS NULL
        FOR NO KEY UPDATE
    ) t
)
UPDATE turns t SET lease_expires_at = clock_timestamp() + make_interval(secs => :lease_seconds)
FROM mine WHERE t.id = mine.id
RETURNING t.id, t.cancel_requested_at IS NOT NULL AS cancel_requested;

-- name: release
-- Hand over turns that cannot be finished here, so that other nodes need not wait until their leases run out.
WITH mine AS MATERIALIZED (
    SELECT t.id
    FROM (SELECT * FROM unnest(:turn_ids::uuid[], :epochs::integer[]) AS u (turn_id, epoch) ORDER BY turn_id) c
    CROSS JOIN LATERAL (
        SELECT id FROM turns WHERE id = c.turn_id AND epoch = c.epoch AND finished_at IS NULL
        FOR NO KEY UPDATE
    ) t
)
UPDATE turns t SET lease_expires_at = '-infinity' FROM mine WHERE t.id = mine.id;

-- name: take_over
-- Make turns whose leases have run out this node's own. `known` are the turns that it knows to be its own; a turn
-- stands up to its last event of a type in `stands_up_to`. With a `conversation_id`, only a turn of it that a `Store`
-- has run. See models/functions/take_over.sql.
SELECT * FROM anynode_take_over(:node, :known, :lease_seconds, :turns_max, :attempts_max, :stands_up_to,
                                :two_beats_seconds, :conversation_id);

-- name: history
-- Read what an agent needs of a conversation, as an admission returns it. See models/functions/read_history.sql.
SELECT coalesce((SELECT m.content FROM messages m WHERE m.conversation_id = c.id AND m.position = 1
                 AND m.role = 'system'), c.system_prompt) AS system_prompt, h.*
FROM conversations c CROSS JOIN LATERAL anynode_read_history(c.id, :messages_max) h WHERE c.id = :conversation_id;

-- name: request_cancel
-- Ask the node that runs a turn (null: the running one) to stop it. No row: not the user's conversation. A null id: it
-- has no such turn. `last_seq` is the conversation's last seq at this instant, if the turn runs: its end comes later.
WITH turn AS (
    SELECT t.id, t.status, c.id AS conversation_id, c.last_seq FROM conversations c
    LEFT JOIN turns t ON t.conversation_id = c.id AND (t.id = :turn_id OR (:turn_id IS NULL AND t.status = 'running'))
    WHERE c.id = :conversation_id AND c.user_id = :user_id
), asked AS (
    UPDATE turns t SET cancel_requested_at = coalesce(t.cancel_requested_at, clock_timestamp())
    FROM turn WHERE t.id = turn.id AND t.status = 'running'
)
SELECT id, CASE WHEN status = 'running' THEN
    greatest(last_seq, (SELECT max(seq) FROM events WHERE conversation_id = turn.conversation_id)) END AS last_seq
FROM turn;

-- name: delete_expired_events
-- Delete the events of at most `turns_max` turns that ended long enough ago.
WITH expired AS (
    SELECT t.id, t.conversation_id, t.first_seq FROM turns t
    WHERE t.first_seq IS NOT NULL AND t.finished_at < clock_timestamp() - make_interval(secs => :retention_seconds)
    ORDER BY t.finished_at LIMIT :turns_max
    FOR NO KEY UPDATE SKIP LOCKED
), deleted AS (
    DELETE FROM events e USING expired x
    WHERE e.conversation_id = x.conversation_id AND e.seq >= x.first_seq AND e.turn_id = x.id
)
UPDATE turns t SET first_seq = NULL FROM expired x WHERE t.id = x.id
RETURNING t.id;

-- name: delete_expired_messages
-- Delete at most `events_max` events of messages that came without a turn, long enough ago. The messages stay.
WITH expired AS (
    SELECT conversation_id, seq FROM events
    WHERE turn_id IS NULL AND written_at < clock_timestamp() - make_interval(secs => :retention_seconds)
    ORDER BY written_at LIMIT :events_max
    FOR UPDATE SKIP LOCKED
)
DELETE FROM events e USING expired x WHERE e.conversation_id = x.conversation_id AND e.seq = x.seq
RETURNING e.seq;

-- name: forget_deletions
-- Forget deletions from long enough ago: every node has heard of them, or reads again by itself.
DELETE FROM deletions WHERE deleted_at < clock_timestamp() - make_interval(secs => :after_seconds);

-- name: find_turn
-- Find a turn of one of the user's conversations by its id alone. A null `first_seq`: its events have been deleted.
SELECT t.conversation_id, t.id AS turn_id, t.status, t.first_seq
FROM turns t JOIN conversations c ON c.id = t.conversation_id WHERE t.id = :turn_id AND c.user_id = :user_id;

-- name: find_conversation
-- Find a conversation by our id of it, or else by the client's own. Null: the user has neither.
SELECT coalesce((SELECT id FROM conversations WHERE id = :conversation_id AND user_id = :user_id),
                (SELECT id FROM conversations WHERE user_id = :user_id AND client_id = :client_id)) AS id;

-- name: find_chat
-- Find the conversation that a client means by an id, with the turn that runs in it or that answered last, if there is
-- one. See models/functions/chat.sql.
WITH c AS MATERIALIZED (
    SELECT anynode_chat(:user_id, :client_chat_id, :conversation_id) AS id
)
SELECT c.id AS conversation_id, t.id AS turn_id, t.status, t.first_seq
FROM c
LEFT JOIN turns t ON t.id = coalesce(
    (SELECT id FROM turns WHERE conversation_id = c.id AND status = 'running'),
    (SELECT turn_id FROM messages WHERE conversation_id = c.id ORDER BY position DESC LIMIT 1))
WHERE c.id IS NOT NULL;

-- name: find_chat_end
-- Find the conversation that a client means by an id: its cursor, the id under which clients show its last message, and
-- whether a turn runs in it. See models/functions/chat.sql.
WITH c AS MATERIALIZED (
    SELECT anynode_chat(:user_id, :client_chat_id, :conversation_id) AS id
)
SELECT c.id AS conversation_id, (SELECT last_seq FROM conversations WHERE id = c.id) AS last_seq,
       (SELECT coalesce(CASE WHEN role = 'user' THEN client_id ELSE turn_id::text END, id::text) FROM messages
        WHERE conversation_id = c.id AND status <> 'superseded' ORDER BY position DESC LIMIT 1) AS last_id,
       (SELECT id FROM turns WHERE conversation_id = c.id AND status = 'running') IS NOT NULL AS is_running
FROM c
WHERE c.id IS NOT NULL;

-- name: find_sent
-- Find a message that the user has sent, by the client's id of it. A message that was appended over HTTP has no such
-- id; it is found by its own (`message_id`), and then `is_appended` is true. `is_last`: the conversation's last turn
-- is that of the message's answer, or neither has one.
WITH sent AS (
    SELECT conversation_id, content, turn_id, false AS is_appended FROM messages
    WHERE user_id = :user_id AND client_id = :client_message_id
    UNION ALL
    SELECT conversation_id, content, turn_id, true FROM messages
    WHERE id = :message_id AND user_id = :user_id AND role = 'user' AND client_id IS NULL
    LIMIT 1
)
SELECT conversation_id, content, is_appended, turn_id IS NOT DISTINCT FROM coalesce(
    (SELECT id FROM turns WHERE conversation_id = s.conversation_id AND status = 'running'),
    (SELECT turn_id FROM messages WHERE conversation_id = s.conversation_id ORDER BY position DESC LIMIT 1)) AS is_last
FROM sent s;

-- name: add_ticket
-- Keep a ticket, and return when it expires. No row: the user has `tickets_max` already. Requests at the same instant do
-- not see one another's tickets, so a user may have a few more: an exact count would take a lock.
INSERT INTO tickets (hash, user_id, token_expires_at, issued_at, limits, expires_at)
SELECT :hash, :user_id, :token_expires_at, :issued_at, :limits, clock_timestamp() + make_interval(secs => :lasts_seconds)
WHERE (SELECT count(*) FROM tickets WHERE user_id = :user_id AND expires_at > now()) < :tickets_max
ON CONFLICT (hash) DO UPDATE SET hash = excluded.hash
RETURNING extract(epoch FROM expires_at)::double precision AS expires_at;

-- name: redeem_ticket
-- Take a ticket: it is deleted, so it is good for one connection. It is worth no more than its token: nothing after the
-- token's end, or if the token was revoked. Where a node of an older release has issued it, that cannot be known.
DELETE FROM tickets t WHERE hash = :hash
RETURNING user_id, token_expires_at, issued_at, limits,
          expires_at > clock_timestamp() AND token_expires_at > extract(epoch FROM clock_timestamp()) AS is_fresh,
          EXISTS (SELECT FROM revocations r
                  WHERE r.user_hash IN ('*', encode(sha256(convert_to(t.user_id, 'UTF8')), 'hex'))
                      AND r.not_before > coalesce(t.issued_at, 0)) AS is_revoked;

-- name: delete_expired_tickets
-- Delete the tickets that nobody used in time.
DELETE FROM tickets WHERE expires_at < now();

-- name: revoke
-- Refuse the tokens of a user (`*`: of all users) that were issued before now. See server/auth/revocations.py.
INSERT INTO revocations AS r (user_hash, not_before)
VALUES (:user_hash, extract(epoch FROM clock_timestamp())::double precision)
ON CONFLICT (user_hash) DO UPDATE
    SET not_before = greatest(r.not_before, excluded.not_before), changed_xid = excluded.changed_xid
RETURNING not_before;

-- name: read_revocations
-- Read a page of all revocations, in the order of their hashes.
SELECT user_hash, not_before FROM revocations WHERE user_hash > :after ORDER BY user_hash LIMIT :rows_max;

-- name: forget_revocations
-- Forget the revocations of single users from long enough ago: tokens of that age have expired.
DELETE FROM revocations
WHERE user_hash <> '*' AND not_before < extract(epoch FROM now()) - :after_seconds::double precision;

-- name: stop_turns
-- Ask all running turns of a user (null: of all users) to stop. For the order of locks see `append_events`.
WITH asked AS MATERIALIZED (
    SELECT t.id FROM turns t JOIN conversations c ON c.id = t.conversation_id
    WHERE t.status = 'running' AND t.cancel_requested_at IS NULL AND (:user_id::text IS NULL OR c.user_id = :user_id)
    ORDER BY t.id
    FOR NO KEY UPDATE OF t
)
UPDATE turns t SET cancel_requested_at = clock_timestamp() FROM asked WHERE t.id = asked.id
RETURNING t.id;

-- name: read_usage
-- Read what turns have used, where they say so.
SELECT id, usage FROM turns WHERE id = ANY (:turn_ids::uuid[]) AND usage IS NOT NULL;

-- name: claim_measurement
-- Return a row to the one of many callers that may measure what a user stores: at most one in a minute.
UPDATE user_usage SET measured_at = clock_timestamp()
WHERE user_id = :user_id AND measured_at NOT BETWEEN clock_timestamp() - interval '1 minute' AND clock_timestamp()
RETURNING user_id;

-- name: measure_stored
-- Count anew what a user stores. What others add while this statement counts is added to the result. It locks nothing
-- until it has counted.
WITH before AS MATERIALIZED (
    SELECT conversations, bytes FROM user_usage WHERE user_id = :user_id
), stored AS MATERIALIZED (
    SELECT count(*) AS conversations,
           coalesce(sum(octet_length(coalesce(c.system_prompt, '')) + octet_length(c.metadata::text) + m.bytes), 0)::bigint
               AS bytes
    FROM conversations c CROSS JOIN LATERAL (
        SELECT coalesce(sum(octet_length(content) + coalesce(octet_length(tool_calls::text), 0)), 0) AS bytes
        FROM messages WHERE conversation_id = c.id
    ) m
    WHERE c.user_id = :user_id
)
UPDATE user_usage u
SET conversations = greatest(u.conversations - b.conversations + s.conversations, 0),
    bytes = greatest(u.bytes - b.bytes + s.bytes, 0)
FROM before b CROSS JOIN stored s WHERE u.user_id = :user_id
RETURNING u.conversations, u.bytes;

-- name: write_emails
-- Store users' e-mail addresses, and the users who are new. Rows that say the same already are not locked. The others
-- are locked in the order of their ids, so that two nodes that write the same users never wait for each other. Each
-- user is looked up by id for the reason that `append_events` gives. An address of a token that was revoked meanwhile
-- is not stored: it would make a deleted user again.
INSERT INTO users (id, email)
SELECT n.id, n.email
FROM unnest(:user_ids::text[], :emails::text[], :issued_ats::double precision[]) AS n (id, email, issued_at)
WHERE (SELECT email FROM users WHERE id = n.id) IS DISTINCT FROM n.email
    AND coalesce((SELECT not_before FROM revocations
                  WHERE user_hash = encode(sha256(convert_to(n.id, 'UTF8')), 'hex')), 0) <= n.issued_at
ORDER BY n.id
ON CONFLICT (id) DO UPDATE SET email = excluded.email WHERE users.email IS DISTINCT FROM excluded.email;

-- name: delete_user
-- Delete a user who has no conversation, and the user's tickets. It fails where a conversation is made meanwhile: the
-- conversation's foreign key refuses what `has_conversations` could not see yet.
WITH unused AS (
    DELETE FROM tickets WHERE user_id = :user_id RETURNING hash
), gone AS (
    DELETE FROM users WHERE id = :user_id AND NOT EXISTS (SELECT FROM conversations WHERE user_id = :user_id)
)
SELECT (SELECT count(*) FROM unused) AS tickets,
       EXISTS (SELECT FROM conversations WHERE user_id = :user_id) AS has_conversations;
