-- anynode_regenerate: begin a turn that answers the last question of a conversation again.
--
-- Does: calls anynode_answer for the last question, whether it has an answer or not.
-- Locks: as anynode_answer.
-- Repeating: with the same `p_turn_id` it is harmless, as anynode_answer is.
-- Called by: `regenerate`.

CREATE OR REPLACE FUNCTION anynode_regenerate(
    p_user_id text, p_conversation_id uuid, p_client_id text, p_turn_id uuid, p_created_at timestamptz,
    p_node text, p_lease_seconds double precision, p_history_messages_max integer,
    OUT outcome text, OUT conversation_id uuid, OUT turn_id uuid, OUT first_seq bigint,
    OUT last_role text, OUT system_prompt text, OUT client_id text,
    OUT roles text[], OUT contents text[], OUT statuses text[], OUT turn_ids uuid[],
    OUT tool_calls jsonb[], OUT tool_names text[], OUT tool_call_ids text[]
) LANGUAGE plpgsql AS $function$
BEGIN
    SELECT a.* INTO anynode_regenerate.outcome, anynode_regenerate.conversation_id, anynode_regenerate.turn_id,
        anynode_regenerate.first_seq, anynode_regenerate.last_role, anynode_regenerate.system_prompt,
        anynode_regenerate.client_id, anynode_regenerate.roles, anynode_regenerate.contents,
        anynode_regenerate.statuses, anynode_regenerate.turn_ids, anynode_regenerate.tool_calls,
        anynode_regenerate.tool_names, anynode_regenerate.tool_call_ids
    FROM anynode_answer(p_user_id, p_conversation_id, p_client_id, false, p_turn_id, p_created_at, p_node,
                        p_lease_seconds, p_history_messages_max) a;
END
$function$;
