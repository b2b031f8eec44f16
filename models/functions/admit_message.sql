-- anynode_admit_message: admit a user's message and begin the turn that answers it.
--
-- Does: checks in this order that the conversation is the user's ('not_found'), that no message has this client's id
--     ('repeated', or 'message_id_taken' where that message is in another conversation), that no turn runs
--     ('conversation_busy'), that a user's message may come next ('role_order'), and that the user's limits allow it
--     ('rate_limited', with what anynode_count returns). Then it inserts the message, its turn with a lease, and the
--     events `message.created` and `turn.started`, and returns 'admitted' with the history. Without
--     `p_conversation_id` it makes the conversation `p_new_conversation_id` first. `last_role` is only meaningful with
--     'role_order'.
-- Locks: the conversation's row (FOR NO KEY UPDATE) before it looks at anything else, so admissions to one conversation
--     come one after another; then the user's row of `user_usage`. It never waits for a turn's lock. Of two transactions
--     that insert the same client's id, or the same new user, the later one waits for the end of the earlier one.
-- Repeating: with the same ids it is harmless: a call that finds its own turn returns 'admitted' again.
-- Called by: `admit`; and by anynode_admit_chat_message and anynode_admit.
--
-- It is a function and not one statement of CTEs because it must see what was committed while it waited for the lock:
-- inside a function every statement takes a new snapshot. It is still one round trip and one transaction.

CREATE OR REPLACE FUNCTION anynode_admit_message(
    p_user_id text, p_conversation_id uuid, p_new_conversation_id uuid, p_title text,
    p_message_id uuid, p_client_id text, p_content text, p_created_at timestamptz,
    p_turn_id uuid, p_node text, p_lease_seconds double precision,
    p_message_created jsonb, p_turn_started jsonb, p_history_messages_max integer, p_limits jsonb,
    OUT outcome text, OUT conversation_id uuid, OUT turn_id uuid, OUT first_seq bigint,
    OUT last_role text, OUT refused_limit text, OUT retry_after_ms bigint, OUT system_prompt text,
    OUT roles text[], OUT contents text[], OUT statuses text[], OUT turn_ids uuid[],
    OUT tool_calls jsonb[], OUT tool_names text[], OUT tool_call_ids text[],
    OUT is_cut boolean
) LANGUAGE plpgsql AS $function$
#variable_conflict use_column
DECLARE
    v_seq bigint := 0;
    v_position integer := 0;
    v_conversation_id uuid := p_conversation_id;
    v_system_prompt text;
    v_has_calls boolean;
    v_is_admitted boolean := false;
    v_is_repeated boolean := false;
    v_is_counted boolean := false;
BEGIN
    IF v_conversation_id IS NOT NULL THEN
        SELECT c.last_seq, c.system_prompt INTO v_seq, v_system_prompt
        FROM conversations c WHERE c.id = v_conversation_id AND c.user_id = p_user_id
        FOR NO KEY UPDATE;
        IF NOT FOUND THEN
            outcome := 'not_found';
            anynode_admit_message.conversation_id := v_conversation_id;
            RETURN;
        END IF;
    END IF;

    SELECT m.conversation_id, m.turn_id INTO anynode_admit_message.conversation_id, anynode_admit_message.turn_id
    FROM messages m WHERE m.user_id = p_user_id AND m.client_id = p_client_id;

    IF NOT FOUND THEN
        IF v_conversation_id IS NULL THEN
            v_conversation_id := p_new_conversation_id;
            INSERT INTO users (id) VALUES (p_user_id) ON CONFLICT DO NOTHING;
            SELECT c.* INTO anynode_admit_message.refused_limit, anynode_admit_message.retry_after_ms
            FROM anynode_count(p_user_id, p_turn_id, 1, octet_length(p_content) + octet_length('{}'), p_limits) c;
            IF refused_limit IS NOT NULL THEN
                -- While this waited for the user's row, the same message may have been admitted elsewhere.
                v_is_repeated := EXISTS (
                    SELECT FROM messages m WHERE m.user_id = p_user_id AND m.client_id = p_client_id);
                IF NOT v_is_repeated THEN
                    outcome := 'rate_limited';
                    RETURN;
                END IF;
                refused_limit := NULL;
                retry_after_ms := NULL;
            ELSE
                v_is_counted := p_limits IS NOT NULL;
                INSERT INTO conversations (id, user_id, title, created_at, updated_at)
                VALUES (v_conversation_id, p_user_id, p_title, p_created_at, p_created_at)
                ON CONFLICT (id) DO NOTHING;
                v_is_repeated := NOT FOUND;
            END IF;
        ELSE
            SELECT t.id INTO anynode_admit_message.turn_id
            FROM turns t WHERE t.conversation_id = v_conversation_id AND t.status = 'running';
            IF FOUND THEN
                outcome := 'conversation_busy';
                anynode_admit_message.conversation_id := v_conversation_id;
                RETURN;
            END IF;
            SELECT m.position, m.role, m.tool_calls IS NOT NULL
            INTO v_position, anynode_admit_message.last_role, v_has_calls
            FROM messages m WHERE m.conversation_id = v_conversation_id ORDER BY m.position DESC LIMIT 1;
            IF NOT FOUND THEN
                v_position := 0;
            ELSIF last_role NOT IN ('assistant', 'system') OR v_has_calls THEN
                outcome := 'role_order';
                anynode_admit_message.conversation_id := v_conversation_id;
                RETURN;
            END IF;
            SELECT c.* INTO anynode_admit_message.refused_limit, anynode_admit_message.retry_after_ms
            FROM anynode_count(p_user_id, p_turn_id, 0, octet_length(p_content), p_limits) c;
            IF refused_limit IS NOT NULL THEN
                outcome := 'rate_limited';
                anynode_admit_message.conversation_id := v_conversation_id;
                RETURN;
            END IF;
            v_is_counted := p_limits IS NOT NULL;
        END IF;

        IF NOT v_is_repeated THEN
            INSERT INTO messages
                (id, conversation_id, user_id, client_id, position, role, content, turn_id, status, created_at)
            VALUES (p_message_id, v_conversation_id, p_user_id, p_client_id, v_position + 1, 'user', p_content,
                    p_turn_id, 'completed', p_created_at)
            ON CONFLICT (user_id, client_id) WHERE client_id IS NOT NULL DO NOTHING;
            v_is_admitted := FOUND;
        END IF;

        IF v_is_admitted THEN
            INSERT INTO turns
                (id, conversation_id, status, node, epoch, lease_expires_at, first_seq, created_at, position)
            VALUES (p_turn_id, v_conversation_id, 'running', p_node, 1,
                    clock_timestamp() + make_interval(secs => p_lease_seconds), v_seq + 1, p_created_at,
                    v_position + 1);
            INSERT INTO events (conversation_id, seq, turn_id, epoch, type, payload) VALUES
                (v_conversation_id, v_seq + 1, p_turn_id, 1, 'message.created', p_message_created),
                (v_conversation_id, v_seq + 2, p_turn_id, 1, 'turn.started', p_turn_started);
            UPDATE conversations
            SET last_seq = v_seq + 2, updated_at = greatest(updated_at, p_created_at), title = coalesce(title, p_title),
                changed_xid = pg_current_xact_id()::text::bigint
            WHERE id = v_conversation_id;
            anynode_admit_message.conversation_id := v_conversation_id;
            anynode_admit_message.turn_id := p_turn_id;
            first_seq := v_seq + 1;
        ELSE
            -- The same message was admitted at the same instant elsewhere; it is committed by now.
            IF v_is_counted AND NOT EXISTS (SELECT FROM turns t WHERE t.id = p_turn_id) THEN
                UPDATE user_usage u
                SET minute_turns = greatest(u.minute_turns - 1, 0), running = array_remove(u.running, p_turn_id)
                WHERE u.user_id = p_user_id;
            END IF;
            IF p_conversation_id IS NULL AND NOT v_is_repeated THEN
                DELETE FROM conversations WHERE id = v_conversation_id;
            END IF;
            SELECT m.conversation_id, m.turn_id INTO anynode_admit_message.conversation_id, anynode_admit_message.turn_id
            FROM messages m WHERE m.user_id = p_user_id AND m.client_id = p_client_id;
        END IF;
    END IF;

    IF NOT v_is_admitted THEN
        SELECT t.first_seq INTO anynode_admit_message.first_seq FROM turns t WHERE t.id = anynode_admit_message.turn_id;
        IF anynode_admit_message.turn_id IS DISTINCT FROM p_turn_id THEN
            outcome := CASE WHEN p_conversation_id <> anynode_admit_message.conversation_id THEN 'message_id_taken'
                            ELSE 'repeated' END;
            RETURN;
        END IF;
    END IF;

    outcome := 'admitted';
    system_prompt := v_system_prompt;
    IF v_is_admitted AND v_position = 0 THEN
        roles := ARRAY['user'];
        contents := ARRAY[p_content];
        RETURN;
    END IF;
    SELECT coalesce(m.content, v_system_prompt) INTO anynode_admit_message.system_prompt
    FROM (VALUES (true)) AS always LEFT JOIN messages m
        ON m.conversation_id = anynode_admit_message.conversation_id AND m.position = 1 AND m.role = 'system';
    SELECT h.* INTO anynode_admit_message.roles, anynode_admit_message.contents, anynode_admit_message.statuses, anynode_admit_message.turn_ids,
        anynode_admit_message.tool_calls, anynode_admit_message.tool_names, anynode_admit_message.tool_call_ids,
        anynode_admit_message.is_cut
    FROM anynode_read_history(anynode_admit_message.conversation_id, p_history_messages_max) h;
END
$function$;
