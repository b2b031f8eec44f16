-- The statements of the serving path, by name. Each is one round trip; every write may be repeated with the
-- same arguments when its outcome is unknown. Plans are guarded by tests/database/test_plans.py.

-- name: admit
-- Own it? repeated message_id? busy? role order? insert message, turn and their events; read the history.
-- See models/migrations.
SELECT * FROM anynode_admit($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14);

-- name: regenerate
-- Own it? busy? the last question? supersede its answer, insert turn and event; read the history.
SELECT * FROM anynode_regenerate($1, $2, $3, $4, $5, $6, $7, $8);

-- name: flush
-- Append what the turns of a node have said. A turn whose epoch is stale, or that has ended, is refused as a
-- whole, in this very statement; returned are the turns that were refused.
-- Turns go over as text, and events by their turn's number among them: asyncpg is slow at arrays of UUIDs.
-- Turns are locked in the order of their ids, as `renew` does, so that the two never wait for each other. Each is looked
-- up by its id: a plan is kept for long, and one that joins as long as `turns` was last seen to be can be quadratic.
-- `finished_at IS NULL` is `status = 'running'`, less the temptation to go by the index of running turns.
WITH claims AS (
    SELECT * FROM unnest($1::text[]::uuid[], $2::integer[]) WITH ORDINALITY AS claim (turn_id, epoch, number)
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
    FROM unnest($3::integer[], $4::bigint[], $5::text[], $6::jsonb[]) AS e (number, seq, type, payload)
    JOIN owned o ON o.number = e.number
    ON CONFLICT (conversation_id, seq) DO NOTHING
)
SELECT turn_id FROM claims WHERE turn_id NOT IN (SELECT id FROM owned);

-- name: flush_with_endings
-- The same, where some of the turns end: their messages, status and the conversation's last_seq commit with it.
WITH claims AS (
    SELECT * FROM unnest($1::text[]::uuid[], $2::integer[]) WITH ORDINALITY AS claim (turn_id, epoch, number)
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
    FROM unnest($3::integer[], $4::bigint[], $5::text[], $6::jsonb[]) AS e (number, seq, type, payload)
    JOIN owned o ON o.number = e.number
    ON CONFLICT (conversation_id, seq) DO NOTHING
), said AS (
    INSERT INTO messages (id, conversation_id, user_id, position, role, content, tool_calls, tool_name,
                          tool_call_id, turn_id, status, created_at)
    SELECT m.id, o.conversation_id, m.user_id,
           m.number + (SELECT max(position) FROM messages WHERE conversation_id = o.conversation_id),
           m.role, m.content, m.tool_calls, m.tool_name, m.tool_call_id, o.id, m.status, m.created_at
    FROM unnest($7::uuid[], $8::uuid[], $9::text[], $10::integer[], $11::text[], $12::text[], $13::jsonb[],
                $14::text[], $15::text[], $16::text[], $17::timestamptz[])
        AS m (turn_id, id, user_id, number, role, content, tool_calls, tool_name, tool_call_id, status, created_at)
    JOIN owned o ON o.id = m.turn_id
), ended AS (
    UPDATE turns t
    SET status = e.status, error = e.error, usage = e.usage, finished_at = clock_timestamp()
    FROM unnest($18::uuid[], $19::text[], $20::jsonb[], $21::jsonb[]) AS e (turn_id, status, error, usage)
    JOIN owned o ON o.id = e.turn_id
    WHERE t.id = o.id
), counted AS (
    UPDATE conversations c
    SET last_seq = e.last_seq
    FROM unnest($18::uuid[], $22::bigint[]) AS e (turn_id, last_seq)
    JOIN owned o ON o.id = e.turn_id
    WHERE c.id = o.conversation_id
)
SELECT turn_id FROM claims WHERE turn_id NOT IN (SELECT id FROM owned);

-- name: flush_one
-- The same for a lone event: without arrays its plan is made once, and not for every call.
WITH owned AS MATERIALIZED (
    SELECT t.id, t.conversation_id, t.epoch FROM turns t WHERE t.id = $1 AND t.epoch = $2 AND t.status = 'running'
    FOR NO KEY UPDATE
), appended AS (
    INSERT INTO events (conversation_id, seq, turn_id, epoch, type, payload)
    SELECT o.conversation_id, $3, o.id, o.epoch, $4, $5 FROM owned o
    ON CONFLICT (conversation_id, seq) DO NOTHING
)
SELECT $1::uuid AS turn_id WHERE NOT EXISTS (SELECT FROM owned);

-- name: turn_states
-- Which of the refused turns ended under the epoch that claimed them: those were not lost, only repeated.
SELECT id, epoch, status FROM turns WHERE id = ANY ($1::uuid[]);

-- name: read_events
-- The journal from a cursor, the cursor's own event included; one row with a null seq when there is none.
SELECT c.last_seq, e.seq, e.turn_id::text AS turn_id, e.type, e.payload, t.id IS NOT NULL AS is_running
FROM conversations c
LEFT JOIN turns t ON t.conversation_id = c.id AND t.status = 'running'
LEFT JOIN LATERAL (
    SELECT seq, turn_id, type, payload FROM events
    WHERE conversation_id = c.id AND seq >= $3 ORDER BY seq LIMIT $4
) e ON true
WHERE c.id = $2 AND c.user_id = $1
ORDER BY e.seq;

-- name: read_running
-- The same for many conversations in which turns run on other nodes; and whether a lease has run out. LIMIT 1: each is
-- looked up, as in `flush`.
SELECT w.number, c.last_seq, e.seq, e.turn_id::text AS turn_id, e.type, e.payload, t.id IS NOT NULL AS is_running,
       coalesce(t.lease_expires_at < clock_timestamp(), false) AS has_lapsed
FROM unnest($1::text[]::uuid[], $2::bigint[]) WITH ORDINALITY AS w (conversation_id, cursor, number)
LEFT JOIN LATERAL (SELECT last_seq FROM conversations WHERE id = w.conversation_id LIMIT 1) c ON true
LEFT JOIN LATERAL (
    SELECT id, lease_expires_at FROM turns WHERE conversation_id = w.conversation_id AND status = 'running' LIMIT 1
) t ON true
LEFT JOIN LATERAL (
    SELECT seq, turn_id, type, payload FROM events
    WHERE conversation_id = w.conversation_id AND seq >= w.cursor ORDER BY seq LIMIT $3
) e ON true
ORDER BY w.number, e.seq;

-- name: watch
-- What a node must hear of: its turns that are to be cancelled, and the conversations in which turns have begun, or that
-- have been deleted, since an earlier watch, whose horizon is $2 (null: none). All transactions before a horizon have ended, so that none is
-- ever missed; some are told of twice. Rows that another cluster has written, before a restore, may be of the future.
SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint AS horizon,
       ARRAY(SELECT id FROM turns WHERE node = $1 AND status = 'running' AND cancel_requested_at IS NOT NULL)
           AS cancelled,
       changed.ids, changed.last_seqs
FROM (
    SELECT array_agg(c.id) AS ids, array_agg(c.last_seq) AS last_seqs
    FROM ((SELECT id, last_seq FROM conversations
           WHERE changed_xid >= $2 AND changed_xid < pg_snapshot_xmax(pg_current_snapshot())::text::bigint
           ORDER BY changed_xid DESC LIMIT $3)
          UNION ALL
          (SELECT conversation_id, 9223372036854775807 FROM deletions
           WHERE changed_xid >= $2 AND changed_xid < pg_snapshot_xmax(pg_current_snapshot())::text::bigint
           ORDER BY changed_xid DESC LIMIT $3)) c
) changed;

-- name: snapshot
-- The newest messages, the running turn with its text so far, and the cursor, all of one instant.
WITH conversation AS (
    SELECT c.id, c.last_seq FROM conversations c WHERE c.id = $2 AND c.user_id = $1
), running AS (
    SELECT t.id, t.conversation_id, t.first_seq FROM turns t JOIN conversation c ON t.conversation_id = c.id
    WHERE t.status = 'running'
), said AS (
    SELECT e.seq, e.type, e.payload ->> 'text' AS text
    FROM running r JOIN events e ON e.conversation_id = r.conversation_id AND e.seq >= r.first_seq
), newest AS (
    SELECT m.* FROM conversation c CROSS JOIN LATERAL (
        SELECT * FROM messages WHERE conversation_id = c.id ORDER BY position DESC LIMIT $3
    ) m
)
SELECT greatest(c.last_seq, (SELECT max(seq) FROM said)) AS seq, (SELECT id FROM running) AS running_turn_id,
       (SELECT string_agg(text, '' ORDER BY seq) FROM said
        WHERE type IN ('turn.delta', 'turn.restarted')
          AND seq >= coalesce((SELECT max(seq) FROM said WHERE type = 'turn.restarted'), 0)) AS running_text,
       m.id, m.role, m.content, m.tool_calls, m.tool_name, m.tool_call_id, m.status, m.turn_id, m.created_at
FROM conversation c LEFT JOIN newest m ON true
ORDER BY m.position;

-- name: create_conversation
WITH known AS (
    INSERT INTO users (id) VALUES ($1) ON CONFLICT DO NOTHING
)
INSERT INTO conversations (id, user_id, title, system_prompt, metadata, created_at, updated_at)
VALUES ($2, $1, $3, $4, $5, $6, $6)
ON CONFLICT (id) DO UPDATE SET id = excluded.id
RETURNING id, client_id, title, system_prompt, metadata, last_seq, created_at, updated_at;

-- name: read_conversation
SELECT id, client_id, title, system_prompt, metadata, last_seq, created_at, updated_at FROM conversations
WHERE id = $2 AND user_id = $1;

-- name: list_conversations
-- Those whose titles contain a text ($4), or all (null).
SELECT id, client_id, title, system_prompt, metadata, last_seq, created_at, updated_at FROM conversations
WHERE user_id = $1 AND ($4::text IS NULL OR strpos(lower(title), lower($4)) > 0)
ORDER BY updated_at DESC, id DESC LIMIT $2 OFFSET $3;

-- name: list_conversations_before
-- The same, after a place in the list: as fast far down as at the top.
SELECT id, client_id, title, system_prompt, metadata, last_seq, created_at, updated_at FROM conversations
WHERE user_id = $1 AND ($4::text IS NULL OR strpos(lower(title), lower($4)) > 0) AND (updated_at, id) < ($5, $6)
ORDER BY updated_at DESC, id DESC LIMIT $2 OFFSET $3;

-- name: update_conversation
-- A field is set where its flag is. `updated_at` is the last activity, and stays.
UPDATE conversations
SET title = CASE WHEN $3 THEN $4 ELSE title END,
    system_prompt = CASE WHEN $5 THEN $6 ELSE system_prompt END,
    metadata = CASE WHEN $7 THEN $8 ELSE metadata END
WHERE id = $2 AND user_id = $1
RETURNING id, client_id, title, system_prompt, metadata, last_seq, created_at, updated_at;

-- name: delete_conversation
-- With its messages, turns and events; or nothing, while a turn runs and $3 is false. See models/migrations.
SELECT outcome FROM anynode_delete($1, $2, $3);

-- name: read_tail
-- The last position, whether a turn runs, and the messages that decide which role may come next: the last one that is
-- no tool's result, and the results behind it.
SELECT m.position, m.role, m.tool_calls, m.tool_call_id,
       EXISTS (SELECT FROM turns t WHERE t.conversation_id = c.id AND t.status = 'running') AS is_running
FROM conversations c LEFT JOIN LATERAL (
    SELECT position, role, tool_calls, tool_call_id FROM messages
    WHERE conversation_id = c.id AND position >= (
        SELECT position FROM messages WHERE conversation_id = c.id AND role <> 'tool' ORDER BY position DESC LIMIT 1)
    ORDER BY position
) m ON true
WHERE c.id = $2 AND c.user_id = $1
ORDER BY m.position;

-- name: append
-- Own it? busy? is the last message still where it was? insert messages and their events. See models/migrations.
SELECT * FROM anynode_append($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11);

-- name: read_messages
-- The newest messages before one ($3, itself included; null: from the end), newest first, not more than so many ($4) or
-- so many bytes ($6), but two. One row with a null id where there are none, no row: not your conversation.
SELECT c.system_prompt, m.*
FROM conversations c LEFT JOIN LATERAL (
    SELECT * FROM (
        SELECT *, sum(octet_length(content)) OVER newest_first AS bytes, row_number() OVER newest_first AS number
        FROM (
            SELECT id, client_id, position, role, content, tool_calls, tool_name, tool_call_id, status, turn_id,
                   created_at
            FROM messages
            WHERE conversation_id = c.id AND ($5 OR status <> 'superseded' OR id = $3) AND position <= coalesce(
                CASE WHEN $3::uuid IS NULL THEN 2147483647 ELSE
                    (SELECT position FROM messages WHERE id = $3 AND conversation_id = c.id) END, 0)
            ORDER BY position DESC LIMIT $4
        ) newest
        WINDOW newest_first AS (ORDER BY position DESC)
    ) counted
    WHERE bytes <= $6 OR number <= 2
) m ON true
WHERE c.id = $2 AND c.user_id = $1
ORDER BY m.position DESC;

-- name: read_turn
-- A turn, and the messages that answered in it, in order; one row with a null id where there are none yet. They come
-- behind the turn's question, and before the next one.
SELECT t.id AS turn_id, t.status, t.error, t.usage, t.created_at AS started_at, t.finished_at,
       m.id, m.role, m.content, m.tool_calls, m.tool_name, m.tool_call_id, m.status AS message_status, m.created_at
FROM conversations c
JOIN turns t ON t.conversation_id = c.id AND t.id = $3
LEFT JOIN LATERAL (
    SELECT * FROM messages
    WHERE conversation_id = c.id AND turn_id = t.id AND role <> 'user' AND position > coalesce(t.position, 0)
        AND position < CASE WHEN t.position IS NULL THEN 2147483647 ELSE coalesce(
            (SELECT position FROM messages
             WHERE conversation_id = c.id AND position > t.position AND role = 'user'
             ORDER BY position LIMIT 1), 2147483647) END
) m ON true
WHERE c.id = $2 AND c.user_id = $1
ORDER BY m.position;

-- name: renew
-- Keep the leases of this node's turns, and learn which of them are to be cancelled. A turn that is missing
-- from the answer is no longer this node's.
WITH mine AS MATERIALIZED (
    SELECT t.id
    FROM (SELECT * FROM unnest($1::uuid[], $2::integer[]) AS u (turn_id, epoch) ORDER BY turn_id) c CROSS JOIN LATERAL (
        SELECT id FROM turns WHERE id = c.turn_id AND epoch = c.epoch AND finished_at IS NULL
        FOR NO KEY UPDATE
    ) t
)
UPDATE turns t SET lease_expires_at = clock_timestamp() + make_interval(secs => $3)
FROM mine WHERE t.id = mine.id
RETURNING t.id, t.cancel_requested_at IS NOT NULL AS cancel_requested;

-- name: release
-- Hand over turns that cannot be finished here: other nodes need not wait for the leases to lapse.
WITH mine AS MATERIALIZED (
    SELECT t.id
    FROM (SELECT * FROM unnest($1::uuid[], $2::integer[]) AS u (turn_id, epoch) ORDER BY turn_id) c CROSS JOIN LATERAL (
        SELECT id FROM turns WHERE id = c.turn_id AND epoch = c.epoch AND finished_at IS NULL
        FOR NO KEY UPDATE
    ) t
)
UPDATE turns t SET lease_expires_at = '-infinity' FROM mine WHERE t.id = mine.id;

-- name: take_over
-- ($1 node, $2 its turns, $3 seconds of lease, $4 turns, $5 attempts, $6 types of events up to which a turn stands,
-- $7 seconds of two beats) See models/migrations.
SELECT * FROM anynode_take_over_turns($1, $2, $3, $4, $5, $6, $7);

-- name: history
-- What an agent needs of a conversation, as an admission returns it.
SELECT coalesce((SELECT m.content FROM messages m WHERE m.conversation_id = c.id AND m.position = 1
                 AND m.role = 'system'), c.system_prompt) AS system_prompt, h.*
FROM conversations c CROSS JOIN LATERAL anynode_history(c.id, $2) h WHERE c.id = $1;

-- name: request_cancel
-- Ask the node that runs the turn to stop it. No row: not your conversation; a null id: no such turn in it.
WITH turn AS (
    SELECT t.id FROM conversations c
    LEFT JOIN turns t ON t.conversation_id = c.id AND (t.id = $3 OR ($3 IS NULL AND t.status = 'running'))
    WHERE c.id = $2 AND c.user_id = $1
), asked AS (
    UPDATE turns t SET cancel_requested_at = coalesce(t.cancel_requested_at, clock_timestamp())
    FROM turn WHERE t.id = turn.id AND t.status = 'running'
)
SELECT id FROM turn;

-- name: delete_expired_events
-- The events of turns that ended long enough ago, so many turns at a time.
WITH expired AS (
    SELECT t.id, t.conversation_id, t.first_seq FROM turns t
    WHERE t.first_seq IS NOT NULL AND t.finished_at < clock_timestamp() - make_interval(secs => $1)
    ORDER BY t.finished_at LIMIT $2
    FOR NO KEY UPDATE SKIP LOCKED
), deleted AS (
    DELETE FROM events e USING expired x
    WHERE e.conversation_id = x.conversation_id AND e.seq >= x.first_seq AND e.turn_id = x.id
)
UPDATE turns t SET first_seq = NULL FROM expired x WHERE t.id = x.id
RETURNING t.id;

-- name: delete_expired_messages
-- The events of messages that came without a turn, and long enough ago; the messages stay.
WITH expired AS (
    SELECT conversation_id, seq FROM events
    WHERE turn_id IS NULL AND written_at < clock_timestamp() - make_interval(secs => $1)
    ORDER BY written_at LIMIT $2
    FOR UPDATE SKIP LOCKED
)
DELETE FROM events e USING expired x WHERE e.conversation_id = x.conversation_id AND e.seq = x.seq
RETURNING e.seq;

-- name: forget_deletions
-- By then every node has heard of them, or looks again by itself.
DELETE FROM deletions WHERE deleted_at < clock_timestamp() - make_interval(secs => $1);

-- name: find_turn
-- A turn of one of the user's conversations, by its id alone. `first_seq` is null when its events have been deleted.
SELECT t.conversation_id, t.id AS turn_id, t.status, t.first_seq
FROM turns t JOIN conversations c ON c.id = t.conversation_id WHERE t.id = $2 AND c.user_id = $1;

-- name: admit_to_chat
-- The same as `admit`, in a conversation that goes by a client's own id, and is made where it is not there yet.
SELECT * FROM anynode_admit_to_chat($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15);

-- name: find_chat
-- The conversation that a client calls so, with its last turn, if one has answered last or runs.
WITH c AS MATERIALIZED (
    SELECT anynode_chat($1, $2, $3) AS id
)
SELECT c.id AS conversation_id, t.id AS turn_id, t.status, t.first_seq
FROM c
LEFT JOIN turns t ON t.id = coalesce(
    (SELECT id FROM turns WHERE conversation_id = c.id AND status = 'running'),
    (SELECT turn_id FROM messages WHERE conversation_id = c.id ORDER BY position DESC LIMIT 1))
WHERE c.id IS NOT NULL;

-- name: find_chat_end
-- Its cursor, its last message by the id that clients show it under, and whether a turn runs in it.
WITH c AS MATERIALIZED (
    SELECT anynode_chat($1, $2, $3) AS id
)
SELECT c.id AS conversation_id, (SELECT last_seq FROM conversations WHERE id = c.id) AS last_seq,
       (SELECT coalesce(CASE WHEN role = 'user' THEN client_id ELSE turn_id::text END, id::text) FROM messages
        WHERE conversation_id = c.id AND status <> 'superseded' ORDER BY position DESC LIMIT 1) AS last_id,
       (SELECT id FROM turns WHERE conversation_id = c.id AND status = 'running') IS NOT NULL AS is_running
FROM c
WHERE c.id IS NOT NULL;

-- name: find_sent
-- What the user has sent under the client's id of a message; or under the one that it has here, as one that was appended
-- over HTTP, and then `is_appended`. `is_last`: the conversation's last turn is that of its answer, or neither has one.
WITH sent AS (
    SELECT conversation_id, content, turn_id, false AS is_appended FROM messages WHERE user_id = $1 AND client_id = $2
    UNION ALL
    SELECT conversation_id, content, turn_id, true FROM messages
    WHERE id = $3 AND user_id = $1 AND role = 'user' AND client_id IS NULL
    LIMIT 1
)
SELECT conversation_id, content, is_appended, turn_id IS NOT DISTINCT FROM coalesce(
    (SELECT id FROM turns WHERE conversation_id = s.conversation_id AND status = 'running'),
    (SELECT turn_id FROM messages WHERE conversation_id = s.conversation_id ORDER BY position DESC LIMIT 1)) AS is_last
FROM sent s;

-- name: add_ticket
-- Nothing is returned where the user has as many as there may be.
INSERT INTO tickets (hash, user_id, token_expires_at, expires_at)
SELECT $1, $2, $3, clock_timestamp() + make_interval(secs => $4)
WHERE (SELECT count(*) FROM tickets WHERE user_id = $2 AND expires_at > now()) < $5
ON CONFLICT (hash) DO UPDATE SET hash = excluded.hash
RETURNING extract(epoch FROM expires_at)::double precision AS expires_at;

-- name: redeem_ticket
DELETE FROM tickets WHERE hash = $1 RETURNING user_id, token_expires_at, expires_at > clock_timestamp() AS is_fresh;

-- name: delete_expired_tickets
DELETE FROM tickets WHERE expires_at < now();

-- name: read_usage
SELECT id, usage FROM turns WHERE id = ANY ($1::uuid[]) AND usage IS NOT NULL;
