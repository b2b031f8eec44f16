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
    v_bytes bigint;
    v_messages_max integer := p_messages_max;
    v_first integer;
BEGIN
    SELECT sum(octet_length(n.content) + coalesce(pg_column_size(n.tool_calls), 0)) INTO v_bytes
    FROM (SELECT m.content, m.tool_calls FROM messages m
          WHERE m.conversation_id = p_conversation_id AND m.status <> 'superseded'
          ORDER BY m.position DESC LIMIT p_messages_max) n;
    IF v_bytes > 2097152 THEN -- asked first, as a running sum of all histories would double their cost
        SELECT count(*), min(c.position) INTO v_messages_max, v_first
        FROM (SELECT n.position, sum(n.bytes) OVER newest_first AS bytes, row_number() OVER newest_first AS number
              FROM (SELECT m.position, octet_length(m.content) + coalesce(pg_column_size(m.tool_calls), 0) AS bytes
                    FROM messages m WHERE m.conversation_id = p_conversation_id AND m.status <> 'superseded'
                    ORDER BY m.position DESC LIMIT p_messages_max) n
              WINDOW newest_first AS (ORDER BY n.position DESC)) c
        WHERE c.bytes <= 2097152 OR c.number <= 2;
        is_cut := EXISTS (
            SELECT FROM messages m
            WHERE m.conversation_id = p_conversation_id AND m.position < v_first AND m.status <> 'superseded'
                AND m.role <> 'system');
    END IF;
    SELECT array_agg(h.role), array_agg(h.content),
           CASE WHEN bool_or(h.status <> 'completed') THEN array_agg(h.status) END,
           CASE WHEN bool_or(h.status <> 'completed') THEN array_agg(h.turn_id) END,
           CASE WHEN bool_or(h.tool_calls IS NOT NULL) THEN array_agg(h.tool_calls) END,
           CASE WHEN bool_or(h.tool_name IS NOT NULL) THEN array_agg(h.tool_name) END,
           CASE WHEN bool_or(h.tool_call_id IS NOT NULL) THEN array_agg(h.tool_call_id) END
    INTO roles, contents, statuses, turn_ids, tool_calls, tool_names, tool_call_ids
    FROM (SELECT m.role, m.content, m.status, m.turn_id, m.tool_calls, m.tool_name, m.tool_call_id
          FROM messages m WHERE m.conversation_id = p_conversation_id AND m.status <> 'superseded'
          ORDER BY m.position DESC LIMIT v_messages_max) h;
END
$function$;
