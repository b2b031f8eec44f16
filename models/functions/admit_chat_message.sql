-- anynode_admit_chat_message: admit a user's message to a conversation that the client calls by an id of its own.
--
-- Does: finds the conversation as anynode_chat does, makes it under the client's id where there is none, and calls
--     anynode_admit_message. Where the message is not admitted, a conversation made here is deleted again.
-- Locks: as anynode_admit_message; but where it makes the conversation it locks the user's row of `user_usage` first, as
--     whatever makes a conversation does. Of two transactions that make the same chat, the later one waits there or at
--     the unique index conversations_client_id, and finds the conversation of the earlier one.
-- Repeating: with the same ids it is harmless, as anynode_admit_message is.
-- Called by: `admit_to_chat`.

CREATE OR REPLACE FUNCTION anynode_admit_chat_message(
    p_user_id text, p_chat_id text, p_chat_uuid uuid, p_new_conversation_id uuid, p_title text,
    p_message_id uuid, p_client_id text, p_content text, p_created_at timestamptz,
    p_turn_id uuid, p_node text, p_lease_seconds double precision,
    p_message_created jsonb, p_turn_started jsonb, p_history_messages_max integer, p_limits jsonb,
    OUT outcome text, OUT conversation_id uuid, OUT turn_id uuid, OUT first_seq bigint,
    OUT last_role text, OUT refused_limit text, OUT retry_after_ms bigint, OUT system_prompt text,
    OUT roles text[], OUT contents text[], OUT statuses text[], OUT turn_ids uuid[],
    OUT tool_calls jsonb[], OUT tool_names text[], OUT tool_call_ids text[],
    OUT is_cut boolean
) LANGUAGE plpgsql AS $function$
DECLARE
    v_conversation_id uuid := anynode_chat(p_user_id, p_chat_id, p_chat_uuid);
    v_is_new boolean := false;
BEGIN
    IF v_conversation_id IS NULL THEN
        INSERT INTO users (id) VALUES (p_user_id) ON CONFLICT DO NOTHING;
        SELECT c.* INTO anynode_admit_chat_message.refused_limit, anynode_admit_chat_message.retry_after_ms
        FROM anynode_count(p_user_id, NULL, 1, octet_length('{}'), p_limits) c;
        IF refused_limit IS NOT NULL THEN
            outcome := 'rate_limited';
            RETURN;
        END IF;
        INSERT INTO conversations (id, user_id, client_id, title, created_at, updated_at)
        VALUES (p_new_conversation_id, p_user_id, p_chat_id, p_title, p_created_at, p_created_at)
        ON CONFLICT DO NOTHING;
        v_is_new := FOUND;
        v_conversation_id := anynode_chat(p_user_id, p_chat_id, p_chat_uuid);
    END IF;
    SELECT a.* INTO anynode_admit_chat_message.outcome, anynode_admit_chat_message.conversation_id,
        anynode_admit_chat_message.turn_id, anynode_admit_chat_message.first_seq, anynode_admit_chat_message.last_role,
        anynode_admit_chat_message.refused_limit, anynode_admit_chat_message.retry_after_ms,
        anynode_admit_chat_message.system_prompt, anynode_admit_chat_message.roles, anynode_admit_chat_message.contents,
        anynode_admit_chat_message.statuses, anynode_admit_chat_message.turn_ids, anynode_admit_chat_message.tool_calls,
        anynode_admit_chat_message.tool_names, anynode_admit_chat_message.tool_call_ids, anynode_admit_chat_message.is_cut
    FROM anynode_admit_message(p_user_id, v_conversation_id, p_new_conversation_id, p_title, p_message_id, p_client_id,
                       p_content, p_created_at, p_turn_id, p_node, p_lease_seconds, p_message_created, p_turn_started,
                       p_history_messages_max, p_limits) a;
    IF v_is_new AND outcome <> 'admitted' THEN
        DELETE FROM conversations c WHERE c.id = v_conversation_id;
    END IF;
END
$function$;
