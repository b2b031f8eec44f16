-- anynode_answer_question: begin a turn that answers the last question of a conversation, once more or at last.
--
-- Does: checks that the conversation is the user's ('not_found'), that no turn runs ('conversation_busy'), that it has
--     a question ('role_order'), and that its id is `p_client_id` if that is given ('not_last'). With
--     `p_is_unanswered`, the question must also be the last message ('answered'). The user's limits must allow another
--     turn ('rate_limited', with what anynode_count returns). Then it supersedes what comes after
--     the question, inserts the turn with a lease and the event `turn.started`, and returns 'admitted' with the history
--     and the question's id.
-- Locks: the conversation's row (FOR NO KEY UPDATE) before it looks at anything else, then the user's row of `user_usage`. It
--     never waits for a turn's lock.
-- Repeating: with the same `p_turn_id` it is harmless: a call that finds that turn returns 'admitted' again.
-- Called by: `answer` and `regenerate`.

CREATE OR REPLACE FUNCTION anynode_answer_question(
    p_user_id text, p_conversation_id uuid, p_client_id text, p_is_unanswered boolean, p_turn_id uuid,
    p_created_at timestamptz, p_node text, p_lease_seconds double precision, p_history_messages_max integer,
    p_limits jsonb,
    OUT outcome text, OUT conversation_id uuid, OUT turn_id uuid, OUT first_seq bigint,
    OUT last_role text, OUT refused_limit text, OUT retry_after_ms bigint, OUT system_prompt text, OUT client_id text,
    OUT roles text[], OUT contents text[], OUT statuses text[], OUT turn_ids uuid[],
    OUT tool_calls jsonb[], OUT tool_names text[], OUT tool_call_ids text[],
    OUT is_cut boolean
) LANGUAGE plpgsql AS $function$
#variable_conflict use_column
DECLARE
    v_seq bigint;
    v_position integer;
BEGIN
    anynode_answer_question.conversation_id := p_conversation_id;
    SELECT c.last_seq, c.system_prompt INTO v_seq, anynode_answer_question.system_prompt
    FROM conversations c WHERE c.id = p_conversation_id AND c.user_id = p_user_id
    FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        outcome := 'not_found';
        RETURN;
    END IF;

    SELECT t.id, t.first_seq INTO anynode_answer_question.turn_id, anynode_answer_question.first_seq
    FROM turns t WHERE t.id = p_turn_id AND t.conversation_id = p_conversation_id;
    IF NOT FOUND THEN
        SELECT t.id INTO anynode_answer_question.turn_id
        FROM turns t WHERE t.conversation_id = p_conversation_id AND t.status = 'running';
        IF FOUND THEN
            outcome := 'conversation_busy';
            RETURN;
        END IF;
        IF p_is_unanswered AND (
            SELECT m.role FROM messages m WHERE m.conversation_id = p_conversation_id ORDER BY m.position DESC LIMIT 1
        ) IS DISTINCT FROM 'user' THEN
            outcome := 'answered';
            RETURN;
        END IF;
        SELECT m.position, coalesce(m.client_id, m.id::text) INTO v_position, anynode_answer_question.client_id
        FROM messages m WHERE m.conversation_id = p_conversation_id AND m.role = 'user'
        ORDER BY m.position DESC LIMIT 1;
        IF NOT FOUND THEN
            outcome := 'role_order';
            RETURN;
        END IF;
        IF p_client_id <> anynode_answer_question.client_id THEN
            outcome := 'not_last';
            RETURN;
        END IF;
        SELECT c.* INTO anynode_answer_question.refused_limit, anynode_answer_question.retry_after_ms
        FROM anynode_count(p_user_id, p_turn_id, 0, 0, p_limits) c;
        IF refused_limit IS NOT NULL THEN
            outcome := 'rate_limited';
            RETURN;
        END IF;

        UPDATE messages m SET status = 'superseded'
        WHERE m.conversation_id = p_conversation_id AND m.position > v_position AND m.status <> 'superseded';
        UPDATE messages m SET turn_id = p_turn_id
        WHERE m.conversation_id = p_conversation_id AND m.position = v_position;
        INSERT INTO turns (id, conversation_id, status, node, epoch, lease_expires_at, first_seq, created_at, position)
        VALUES (p_turn_id, p_conversation_id, 'running', p_node, 1,
                clock_timestamp() + make_interval(secs => p_lease_seconds), v_seq + 1, p_created_at, v_position);
        INSERT INTO events (conversation_id, seq, turn_id, epoch, type, payload)
        VALUES (p_conversation_id, v_seq + 1, p_turn_id, 1, 'turn.started',
                jsonb_build_object('message_id', anynode_answer_question.client_id));
        UPDATE conversations
        SET last_seq = v_seq + 1, updated_at = greatest(updated_at, p_created_at),
            changed_xid = pg_current_xact_id()::text::bigint
        WHERE id = p_conversation_id;
        anynode_answer_question.turn_id := p_turn_id;
        anynode_answer_question.first_seq := v_seq + 1;
    ELSE
        SELECT e.payload ->> 'message_id' INTO anynode_answer_question.client_id
        FROM events e WHERE e.conversation_id = p_conversation_id AND e.seq = anynode_answer_question.first_seq;
    END IF;

    outcome := 'admitted';
    SELECT coalesce(m.content, anynode_answer_question.system_prompt) INTO anynode_answer_question.system_prompt
    FROM (VALUES (true)) AS always LEFT JOIN messages m
        ON m.conversation_id = p_conversation_id AND m.position = 1 AND m.role = 'system';
    SELECT h.* INTO anynode_answer_question.roles, anynode_answer_question.contents, anynode_answer_question.statuses,
        anynode_answer_question.turn_ids, anynode_answer_question.tool_calls, anynode_answer_question.tool_names,
        anynode_answer_question.tool_call_ids, anynode_answer_question.is_cut
    FROM anynode_read_history(p_conversation_id, p_history_messages_max) h;
END
$function$;
