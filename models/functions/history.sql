-- anynode_history: read the newest messages of a conversation, for nodes of the release 0.1.0.
--
-- Does: calls anynode_read_history.
-- Locks: nothing.
-- Repeating: harmless; it only reads.
-- Called by: nodes of the release 0.1.0.

CREATE OR REPLACE FUNCTION anynode_history(
    p_conversation_id uuid, p_messages_max integer,
    OUT roles text[], OUT contents text[], OUT statuses text[], OUT turn_ids uuid[],
    OUT tool_calls jsonb[], OUT tool_names text[], OUT tool_call_ids text[]
) LANGUAGE plpgsql STABLE AS $function$
BEGIN
    SELECT h.roles, h.contents, h.statuses, h.turn_ids, h.tool_calls, h.tool_names, h.tool_call_ids
    INTO anynode_history.roles, anynode_history.contents, anynode_history.statuses, anynode_history.turn_ids,
        anynode_history.tool_calls, anynode_history.tool_names, anynode_history.tool_call_ids
    FROM anynode_read_history(p_conversation_id, p_messages_max) h;
END
$function$;
