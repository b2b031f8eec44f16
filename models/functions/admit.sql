-- anynode_admit: admit a user's message, for nodes of the release 0.1.0, which know no limits of users.
--
-- Does: calls anynode_admit_message without limits.
-- Locks: as anynode_admit_message.
-- Repeating: with the same ids it is harmless, as anynode_admit_message is.
-- Called by: nodes of the release 0.1.0.

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
BEGIN
    SELECT a.outcome, a.conversation_id, a.turn_id, a.first_seq, a.last_role, a.system_prompt, a.roles, a.contents,
           a.statuses, a.turn_ids, a.tool_calls, a.tool_names, a.tool_call_ids
    INTO anynode_admit.outcome, anynode_admit.conversation_id, anynode_admit.turn_id, anynode_admit.first_seq,
        anynode_admit.last_role, anynode_admit.system_prompt, anynode_admit.roles, anynode_admit.contents,
        anynode_admit.statuses, anynode_admit.turn_ids, anynode_admit.tool_calls, anynode_admit.tool_names,
        anynode_admit.tool_call_ids
    FROM anynode_admit_message(
        p_user_id, p_conversation_id, p_new_conversation_id, p_title, p_message_id, p_client_id, p_content,
        p_created_at, p_turn_id, p_node, p_lease_seconds, p_message_created, p_turn_started, p_history_messages_max,
        NULL) a;
END
$function$;
