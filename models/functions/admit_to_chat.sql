-- anynode_admit_to_chat: admit a user's message to a conversation that the client calls by an id of its own.
--
-- Does: finds the conversation as anynode_chat does, makes it under the client's id where there is none, and calls
--     anynode_admit. Where the message is not admitted, a conversation made here is deleted again.
-- Locks: as anynode_admit. Of two transactions that make the same chat, the later one waits at the unique index
--     conversations_client_id, and finds the conversation of the earlier one.
-- Repeating: with the same ids it is harmless, as anynode_admit is.
-- Called by: `admit_to_chat`.

CREATE OR REPLACE FUNCTION anynode_admit_to_chat(
    p_user_id text, p_chat_id text, p_chat_uuid uuid, p_new_conversation_id uuid, p_title text,
    p_message_id uuid, p_client_id text, p_content text, p_created_at timestamptz,
    p_turn_id uuid, p_node text, p_lease_seconds double precision,
    p_message_created jsonb, p_turn_started jsonb, p_history_messages_max integer,
    OUT outcome text, OUT conversation_id uuid, OUT turn_id uuid, OUT first_seq bigint,
    OUT last_role text, OUT system_prompt text,
    OUT roles text[], OUT contents text[], OUT statuses text[], OUT turn_ids uuid[],
    OUT tool_calls jsonb[], OUT tool_names text[], OUT tool_call_ids text[]
) LANGUAGE plpgsql AS $function$
DECLARE
    v_conversation_id uuid := anynode_chat(p_user_id, p_chat_id, p_chat_uuid);
    v_is_new boolean := false;
BEGIN
    IF v_conversation_id IS NULL THEN
        INSERT INTO users (id) VALUES (p_user_id) ON CONFLICT DO NOTHING;
        INSERT INTO conversations (id, user_id, client_id, title, created_at, updated_at)
        VALUES (p_new_conversation_id, p_user_id, p_chat_id, p_title, p_created_at, p_created_at)
        ON CONFLICT DO NOTHING;
        v_is_new := FOUND;
        v_conversation_id := anynode_chat(p_user_id, p_chat_id, p_chat_uuid);
    END IF;
    SELECT a.* INTO anynode_admit_to_chat.outcome, anynode_admit_to_chat.conversation_id,
        anynode_admit_to_chat.turn_id, anynode_admit_to_chat.first_seq, anynode_admit_to_chat.last_role,
        anynode_admit_to_chat.system_prompt, anynode_admit_to_chat.roles, anynode_admit_to_chat.contents,
        anynode_admit_to_chat.statuses, anynode_admit_to_chat.turn_ids, anynode_admit_to_chat.tool_calls,
        anynode_admit_to_chat.tool_names, anynode_admit_to_chat.tool_call_ids
    FROM anynode_admit(p_user_id, v_conversation_id, p_new_conversation_id, p_title, p_message_id, p_client_id,
                       p_content, p_created_at, p_turn_id, p_node, p_lease_seconds, p_message_created, p_turn_started,
                       p_history_messages_max) a;
    IF v_is_new AND outcome <> 'admitted' THEN
        DELETE FROM conversations c WHERE c.id = v_conversation_id;
    END IF;
END
$function$;
