-- anynode_read_history: read the newest messages of a conversation, in the form that an agent's history is made of.
--
-- Does: returns one row of arrays, the newest message first, of at most `p_messages_max` messages, and from the third on
--     no more than 2 MiB of content. `is_cut` says that the bytes have left messages out, other than system messages.
--     One row of arrays is several times cheaper to transfer than a row for each message. An array that would hold only
--     nulls (or, for `statuses`, only 'completed') is null as a whole; `turn_ids` is null when `statuses` is.
--     Superseded messages are left out: they would push others out.
-- Locks: nothing.
-- Repeating: harmless; it only reads.
-- Called by: `history`; and by anynode_admit_message, anynode_answer_question and anynode_history.

CREATE OR REPLACE FUNCTION anynode_read_history(
    p_conversation_id uuid, p_messages_max integer,
    OUT roles text[], OUT contents text[], OUT statuses text[], OUT turn_ids uuid[],
    OUT tool_calls jsonb[], OUT tool_names text[], OUT tool_call_ids text[], OUT is_cut boolean
) LANGUAGE plpgsql STABLE AS $function$
DECLARE
    v_count integer;
    v_first integer;
BEGIN
    SELECT array_agg(h.role), array_agg(h.content),
           CASE WHEN bool_or(h.status <> 'completed') THEN array_agg(h.status) END,
           CASE WHEN bool_or(h.status <> 'completed') THEN array_agg(h.turn_id) END,
           CASE WHEN bool_or(h.tool_calls IS NOT NULL) THEN array_agg(h.tool_calls) END,
           CASE WHEN bool_or(h.tool_name IS NOT NULL) THEN array_agg(h.tool_name) END,
           CASE WHEN bool_or(h.tool_call_id IS NOT NULL) THEN array_agg(h.tool_call_id) END,
           count(*), min(h.position)
    INTO roles, contents, statuses, turn_ids, tool_calls, tool_names, tool_call_ids, v_count, v_first
    FROM (
        SELECT n.*, sum(octet_length(n.content) + coalesce(pg_column_size(n.tool_calls), 0)) OVER newest_first AS bytes,
               row_number() OVER newest_first AS number
        FROM (SELECT m.position, m.role, m.content, m.status, m.turn_id, m.tool_calls, m.tool_name, m.tool_call_id
              FROM messages m WHERE m.conversation_id = p_conversation_id AND m.status <> 'superseded'
              ORDER BY m.position DESC LIMIT p_messages_max) n
        WINDOW newest_first AS (ORDER BY n.position DESC)
    ) h
    WHERE h.bytes <= 2097152 OR h.number <= 2;
    is_cut := v_count < p_messages_max AND v_first > 1 AND EXISTS (
        SELECT FROM messages m
        WHERE m.conversation_id = p_conversation_id AND m.position < v_first AND m.status <> 'superseded'
            AND m.role <> 'system');
END
$function$;
