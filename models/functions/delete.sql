-- anynode_delete: delete a conversation with its messages, turns and events.
--
-- Does: checks that the conversation is the user's ('not_found') and, unless `p_is_forced`, that no turn runs
--     ('conversation_busy'). Then it deletes everything and notes the deletion for the other nodes. The owner of a turn
--     that ran finds its next write refused.
-- Locks: the running turn, then the conversation (both FOR UPDATE). That is the order of a flush with endings, which
--     holds its turns when it updates the conversation. Under both locks it looks again for a running turn, as one may
--     have been admitted meanwhile. What a flush wrote before it let the turn go is deleted too: inside a function,
--     every statement takes a new snapshot.
-- Repeating: harmless; the second call returns 'not_found'. The caller knows whether an earlier call may have deleted.
-- Called by: `delete_conversation`.

CREATE OR REPLACE FUNCTION anynode_delete(
    p_user_id text, p_conversation_id uuid, p_is_forced boolean, OUT outcome text
) LANGUAGE plpgsql AS $function$
BEGIN
    PERFORM FROM conversations c WHERE c.id = p_conversation_id AND c.user_id = p_user_id;
    IF NOT FOUND THEN
        outcome := 'not_found';
        RETURN;
    END IF;
    PERFORM FROM turns t WHERE t.conversation_id = p_conversation_id AND t.status = 'running' FOR UPDATE;
    PERFORM FROM conversations c WHERE c.id = p_conversation_id AND c.user_id = p_user_id FOR UPDATE;
    IF NOT FOUND THEN
        outcome := 'not_found';
        RETURN;
    END IF;
    IF NOT p_is_forced AND EXISTS (
        SELECT FROM turns t WHERE t.conversation_id = p_conversation_id AND t.status = 'running') THEN
        outcome := 'conversation_busy';
        RETURN;
    END IF;
    DELETE FROM turns t WHERE t.conversation_id = p_conversation_id;
    DELETE FROM conversations c WHERE c.id = p_conversation_id;
    DELETE FROM events e WHERE e.conversation_id = p_conversation_id;
    INSERT INTO deletions (conversation_id) VALUES (p_conversation_id) ON CONFLICT DO NOTHING;
    outcome := 'deleted';
END
$function$;
