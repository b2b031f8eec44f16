-- anynode_admit: admit a user's message and begin the turn that answers it.
--
-- Does: checks in this order that the conversation is the user's ('not_found'), that no message has this client's id
--     ('repeated', or 'message_id_taken' where that message is in another conversation), that no turn runs
--     ('conversation_busy'), and that a user's message may come next ('role_order'). Then it inserts the message, its
--     turn with a lease, and the events `message.created` and `turn.started`, and returns 'admitted' with the history.
--     Without `p_conversation_id` it makes the conversation `p_new_conversation_id` first. `last_role` is only
--     meaningful with 'role_order'.
-- Locks: the conversation's row (FOR NO KEY UPDATE) before it looks at anything else, so admissions to one conversation
--     come one after another. It never waits for a turn's lock. Of two transactions that insert the same client's
--     id, or the same new user, the later one waits at the unique index for the end of the earlier one.
-- Repeating: with the same ids it is harmless: a call that finds its own turn returns 'admitted' again.
-- Called by: `admit`; and by anynode_admit_to_chat.
--
-- It is a function and not one statement of CTEs because it must see what was committed while it waited for the lock:
-- inside a function every statement takes a new snapshot. It is still one round trip and one transaction.

CREATE OR REPLACE FUNCTION anynode_admit(
    p_user_id text, p_conversation_id uuid, p_new_conversation_id uuid, p_title text,
    p_message_id uuid, p_client_id text, p_content text, p_created_at timestamptz,
    p_turn_id uuid, p_node text, p_lease_seconds double precision,
    p_message_created jsonb, p_turn_started jsonb, p_history_messages_max integer,
    OUT outcome text, OUT conversation_id uuid, OUT turn_id uuid, OUT first_seq bigint,
    OUT last_role text, OUT system_prompt text,
    OUT roles text[], OUT contents text[], OUT statuses text[], OUT turn_ids uuid[],
    OUT tool_calls jsonb[], OUT tool_names text[], OUT tool_call_ids text[]
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
BEGIN
    IF v_conversation_id IS NOT NULL THEN
        SELECT c.last_seq, c.system_prompt INTO v_seq, v_system_prompt
        FROM conversations c WHERE c.id = v_conversation_id AND c.user_id = p_user_id
        FOR NO KEY UPDATE;
        IF NOT FOUND THEN
            outcome := 'not_found';
            anynode_admit.conversation_id := v_conversation_id;
            RETURN;
        END IF;
    END IF;

    SELECT m.conversation_id, m.turn_id INTO anynode_admit.conversation_id, anynode_admit.turn_id
    FROM messages m WHERE m.user_id = p_user_id AND m.client_id = p_client_id;

    IF NOT FOUND THEN
        IF v_conversation_id IS NULL THEN
            v_conversation_id := p_new_conversation_id;
            INSERT INTO users (id) VALUES (p_user_id) ON CONFLICT DO NOTHING;
            INSERT INTO conversations (id, user_id, title, created_at, updated_at)
            VALUES (v_conversation_id, p_user_id, p_title, p_created_at, p_created_at)
            ON CONFLICT (id) DO NOTHING;
            v_is_repeated := NOT FOUND;
        ELSE
            SELECT t.id INTO anynode_admit.turn_id
            FROM turns t WHERE t.conversation_id = v_conversation_id AND t.status = 'running';
            IF FOUND THEN
                outcome := 'conversation_busy';
                anynode_admit.conversation_id := v_conversation_id;
                RETURN;
            END IF;
            SELECT m.position, m.role, m.tool_calls IS NOT NULL INTO v_position, anynode_admit.last_role, v_has_calls
            FROM messages m WHERE m.conversation_id = v_conversation_id ORDER BY m.position DESC LIMIT 1;
            IF NOT FOUND THEN
                v_position := 0;
            ELSIF last_role NOT IN ('assistant', 'system') OR v_has_calls THEN
                outcome := 'role_order';
                anynode_admit.conversation_id := v_conversation_id;
                RETURN;
            END IF;
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
            anynode_admit.conversation_id := v_conversation_id;
            anynode_admit.turn_id := p_turn_id;
            first_seq := v_seq + 1;
        ELSE
            -- The same message was admitted at the same instant elsewhere; it is committed by now.
            IF p_conversation_id IS NULL AND NOT v_is_repeated THEN
                DELETE FROM conversations WHERE id = v_conversation_id;
            END IF;
            SELECT m.conversation_id, m.turn_id INTO anynode_admit.conversation_id, anynode_admit.turn_id
            FROM messages m WHERE m.user_id = p_user_id AND m.client_id = p_client_id;
        END IF;
    END IF;

    IF NOT v_is_admitted THEN
        SELECT t.first_seq INTO anynode_admit.first_seq FROM turns t WHERE t.id = anynode_admit.turn_id;
        IF anynode_admit.turn_id IS DISTINCT FROM p_turn_id THEN
            outcome := CASE WHEN p_conversation_id <> anynode_admit.conversation_id THEN 'message_id_taken'
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
    SELECT coalesce(m.content, v_system_prompt) INTO anynode_admit.system_prompt
    FROM (VALUES (true)) AS always LEFT JOIN messages m
        ON m.conversation_id = anynode_admit.conversation_id AND m.position = 1 AND m.role = 'system';
    SELECT h.* INTO anynode_admit.roles, anynode_admit.contents, anynode_admit.statuses, anynode_admit.turn_ids,
        anynode_admit.tool_calls, anynode_admit.tool_names, anynode_admit.tool_call_ids
    FROM anynode_history(anynode_admit.conversation_id, p_history_messages_max) h;
END
$function$;
