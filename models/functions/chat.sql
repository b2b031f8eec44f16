-- anynode_chat: find the user's conversation that a client means by an id.
--
-- Does: returns the id of the conversation that has the client's id `p_chat_id`; else that of the user's conversation
--     with the id `p_chat_uuid`; else null.
-- Locks: nothing.
-- Repeating: harmless; it only reads.
-- Called by: `find_chat`, `find_chat_end`, `get_or_create_conversation`; and by anynode_admit_chat_message.

CREATE OR REPLACE FUNCTION anynode_chat(p_user_id text, p_chat_id text, p_chat_uuid uuid)
RETURNS uuid LANGUAGE sql STABLE AS $$
    SELECT coalesce(
        (SELECT c.id FROM conversations c WHERE c.user_id = p_user_id AND c.client_id = p_chat_id),
        (SELECT c.id FROM conversations c WHERE c.user_id = p_user_id AND c.id = p_chat_uuid))
$$;
