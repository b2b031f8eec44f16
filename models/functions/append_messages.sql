-- anynode_append_messages: append messages that come without a turn.
--
-- Does: checks that the conversation is the user's ('not_found'), that no turn runs ('conversation_busy'), that the
--     last message is still the one at `p_position` ('moved'), and that the user may store more ('rate_limited', with
--     what anynode_count returns). Then it inserts the messages and their events, and
--     returns 'appended' with the seq of the last event. Whether the roles are in order was decided for that position
--     by models/rules.py, before the call. A conversation without a title gets one from the first question among the
--     messages, by the rule for admitted ones (`question_of` in server/engine/admission.py). Its spaces are listed
--     because what `\s` stands for depends on the database's locale.
-- Locks: the conversation's row (FOR NO KEY UPDATE) before it looks at anything else, then the user's row of `user_usage`. It
--     never waits for a turn's lock.
-- Repeating: with the same ids it is harmless: a call that finds the first message returns 'appended' again.
-- Called by: `append`.

CREATE OR REPLACE FUNCTION anynode_append_messages(
    p_user_id text, p_conversation_id uuid, p_position integer, p_created_at timestamptz,
    p_ids uuid[], p_roles text[], p_contents text[], p_tool_calls jsonb[], p_tool_names text[],
    p_tool_call_ids text[], p_payloads jsonb[], p_limits jsonb,
    OUT outcome text, OUT last_seq bigint, OUT refused_limit text, OUT retry_after_ms bigint
) LANGUAGE plpgsql AS $function$
#variable_conflict use_column
BEGIN
    SELECT c.last_seq INTO anynode_append_messages.last_seq
    FROM conversations c WHERE c.id = p_conversation_id AND c.user_id = p_user_id
    FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        outcome := 'not_found';
    ELSIF EXISTS (SELECT FROM messages m WHERE m.id = p_ids[1]) THEN
        outcome := 'appended';
        anynode_append_messages.last_seq := coalesce(
            (SELECT e.seq FROM events e
             WHERE e.conversation_id = p_conversation_id AND e.turn_id IS NULL
                 AND e.payload #>> '{message,id}' = p_ids[cardinality(p_ids)]::text
             ORDER BY e.seq DESC LIMIT 1),
            anynode_append_messages.last_seq);
    ELSIF EXISTS (SELECT FROM turns t WHERE t.conversation_id = p_conversation_id AND t.status = 'running') THEN
        outcome := 'conversation_busy';
    ELSIF p_position <> coalesce(
        (SELECT max(m.position) FROM messages m WHERE m.conversation_id = p_conversation_id), 0) THEN
        outcome := 'moved';
    ELSE
        SELECT n.* INTO anynode_append_messages.refused_limit, anynode_append_messages.retry_after_ms
        FROM anynode_count(p_user_id, NULL, 0, (
            SELECT sum(octet_length(g.content) + coalesce(octet_length(g.tool_calls::text), 0))
            FROM unnest(p_contents, p_tool_calls) AS g (content, tool_calls)), p_limits) n;
        IF refused_limit IS NOT NULL THEN
            outcome := 'rate_limited';
            RETURN;
        END IF;
        INSERT INTO messages (id, conversation_id, user_id, position, role, content, tool_calls, tool_name,
                              tool_call_id, status, created_at)
        SELECT n.id, p_conversation_id, p_user_id, p_position + n.number, n.role, n.content, n.tool_calls, n.tool_name,
               n.tool_call_id, 'completed', p_created_at
        FROM unnest(p_ids, p_roles, p_contents, p_tool_calls, p_tool_names, p_tool_call_ids) WITH ORDINALITY
            AS n (id, role, content, tool_calls, tool_name, tool_call_id, number);
        INSERT INTO events (conversation_id, seq, epoch, type, payload, written_at)
        SELECT p_conversation_id, anynode_append_messages.last_seq + n.number, 0, 'message.created', n.payload,
               clock_timestamp()
        FROM unnest(p_payloads) WITH ORDINALITY AS n (payload, number);
        anynode_append_messages.last_seq := anynode_append_messages.last_seq + cardinality(p_ids);
        UPDATE conversations c
        SET last_seq = anynode_append_messages.last_seq, updated_at = greatest(updated_at, p_created_at),
            title = coalesce(title, (
                SELECT nullif(left(btrim(regexp_replace(n.content,
                    '[\u0009-\u000d\u001c-\u0020\u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+',
                    ' ', 'g'), ' '), 80), '')
                FROM unnest(p_roles, p_contents) WITH ORDINALITY AS n (role, content, number)
                WHERE n.role = 'user' ORDER BY n.number LIMIT 1)),
            changed_xid = pg_current_xact_id()::text::bigint
        WHERE c.id = p_conversation_id;
        outcome := 'appended';
    END IF;
END
$function$;
