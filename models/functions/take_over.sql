-- anynode_take_over: make turns whose lease has run out a node's own.
--
-- Does: takes at most `p_turns_max` turns, gives each the next epoch and a lease, and writes `turn.restarted`. It also
--     takes the node's own turns that are not in `p_known` and have not been renewed for `p_two_beats` seconds: the
--     answer that would have told the node of them was lost. Of the events it keeps those up to the last one of a type
--     in `p_standing`, and all of them where the turn is only to be ended (cancelled, attempted too often, or without
--     an agent). `attempts` counts the nodes that died; a turn that was handed over (lease '-infinity') is not counted
--     again.
--     With `p_conversation_id` it takes only a turn of this conversation that a `Store` has run. `agent_is_gone` says
--     that a node has taken such a turn: its agent was a function in the process that ran it, so no node has it. The
--     turn keeps its mark `store:`, in case that node dies before it has ended the turn.
-- Locks: the turns it takes (FOR NO KEY UPDATE, in the order of their ids). It skips turns that are locked, so it waits
--     for nothing. The journal is read after the turn is locked, when the old owner can append no more.
-- Repeating: harmless but not without effect: where the first answer was lost, the second call does not return those
--     turns; the node finds them at a later beat, because it does not know them, under yet another epoch.
-- Called by: `take_over`.
--
-- It is a function and not one statement of CTEs because the journal must be read with a snapshot from after the lock.

CREATE OR REPLACE FUNCTION anynode_take_over(
    p_node text, p_known uuid[], p_lease_seconds double precision, p_turns_max integer, p_attempts_max integer,
    p_standing text[], p_two_beats double precision, p_conversation_id uuid
) RETURNS TABLE (
    turn_id uuid, conversation_id uuid, user_id text, epoch integer, cancel_requested boolean, is_exhausted boolean,
    agent_is_gone boolean, seq bigint, text text, types text[], payloads jsonb[]
) LANGUAGE plpgsql AS $function$
#variable_conflict use_column
DECLARE
    v_turn record;
    v_stands_to bigint;
BEGIN
    FOR v_turn IN
        SELECT t.id, t.conversation_id, t.node, t.epoch + 1 AS epoch, t.first_seq, t.cancel_requested_at,
               t.attempts + CASE WHEN t.lease_expires_at = '-infinity' THEN 0 ELSE 1 END AS attempts
        FROM turns t
        WHERE t.status = 'running'
            AND (p_conversation_id IS NULL OR (t.conversation_id = p_conversation_id AND t.node LIKE 'store:%'))
            AND (t.lease_expires_at < clock_timestamp()
                OR (t.node = p_node AND NOT t.id = ANY (p_known)
                    AND t.lease_expires_at < clock_timestamp() + make_interval(secs => p_lease_seconds - p_two_beats)))
        ORDER BY t.id LIMIT p_turns_max
        FOR NO KEY UPDATE SKIP LOCKED
    LOOP
        turn_id := v_turn.id;
        conversation_id := v_turn.conversation_id;
        epoch := v_turn.epoch;
        cancel_requested := v_turn.cancel_requested_at IS NOT NULL;
        is_exhausted := v_turn.attempts > p_attempts_max;
        agent_is_gone := v_turn.node LIKE 'store:%' AND p_node NOT LIKE 'store:%';
        UPDATE turns t
        SET node = CASE WHEN agent_is_gone THEN 'store:' ELSE '' END || p_node, epoch = v_turn.epoch, attempts = v_turn.attempts,
            lease_expires_at = clock_timestamp() + make_interval(secs => p_lease_seconds)
        WHERE t.id = v_turn.id;
        SELECT c.user_id INTO anynode_take_over.user_id FROM conversations c WHERE c.id = v_turn.conversation_id;

        SELECT max(e.seq) + 1, max(e.seq) FILTER (
                   WHERE e.type = ANY (p_standing) OR cancel_requested OR is_exhausted OR agent_is_gone)
        INTO anynode_take_over.seq, v_stands_to
        FROM events e WHERE e.conversation_id = v_turn.conversation_id AND e.seq >= v_turn.first_seq;

        SELECT array_agg(e.type ORDER BY e.seq), array_agg(e.payload ORDER BY e.seq),
               coalesce(string_agg(e.payload ->> 'text', '' ORDER BY e.seq) FILTER (WHERE e.seq >= coalesce((
                   SELECT max(r.seq) FROM events r
                   WHERE r.conversation_id = v_turn.conversation_id AND r.type = 'turn.restarted'
                       AND r.seq BETWEEN v_turn.first_seq AND v_stands_to), 0)), '')
        INTO anynode_take_over.types, anynode_take_over.payloads, anynode_take_over.text
        FROM events e
        WHERE e.conversation_id = v_turn.conversation_id AND e.seq BETWEEN v_turn.first_seq AND v_stands_to
            AND e.type IN ('turn.delta', 'turn.restarted', 'turn.tool_call', 'turn.tool_result');

        INSERT INTO events (conversation_id, seq, turn_id, epoch, type, payload)
        VALUES (v_turn.conversation_id, anynode_take_over.seq, v_turn.id, v_turn.epoch, 'turn.restarted',
                jsonb_build_object('epoch', v_turn.epoch, 'text', anynode_take_over.text));
        RETURN NEXT;
    END LOOP;
END
$function$;
