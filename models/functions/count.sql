-- anynode_count: count what a user is about to spend or store, if the user's limits allow it.
--
-- Does: for a turn (`p_turn_id`; null: none) it checks the turns that run, those of this minute, and the tokens of this
--     day; for what is stored, the number of conversations and the bytes of everything. `p_limits` has the limits by
--     the names of their settings; one that is 0 or missing is off. Without `p_limits` it does nothing. Returns nulls
--     where everything is counted, else the name of the limit that was reached and when to try again; then nothing is
--     counted. A minute begins with its first turn, and a day at midnight, UTC.
--     Turns that run are known by their ids, so those that have ended or were deleted meanwhile are found out here,
--     and no node has to say that one has ended. What is stored is only added up: `retry_after_ms` 0 says that it may be
--     measured (`claim_measurement`, `measure_stored`), which also finds what was deleted.
-- Locks: the user's row of `user_usage` (FOR NO KEY UPDATE), until the end of the transaction. A caller that also locks a
--     conversation that others can see locks that first.
-- Repeating: harmless for a turn that is there already. What is stored is counted again, and corrected when it is
--     measured.
-- Called by: `create_conversation`, `get_or_create_conversation`, `update_conversation`; and by anynode_admit_message,
--     anynode_admit_chat_message, anynode_answer_question and anynode_append_messages.

CREATE OR REPLACE FUNCTION anynode_count(
    p_user_id text, p_turn_id uuid, p_conversations integer, p_bytes bigint, p_limits jsonb,
    OUT refused_limit text, OUT retry_after_ms bigint
) LANGUAGE plpgsql AS $function$
DECLARE
    v_usage user_usage;
    v_now timestamptz;
    v_today date;
    v_turns_max bigint := coalesce((p_limits ->> 'turns_per_user_max')::bigint, 0);
    v_per_minute bigint := coalesce((p_limits ->> 'turns_per_user_per_minute')::bigint, 0);
    v_tokens_max bigint := coalesce((p_limits ->> 'tokens_per_user_per_day')::bigint, 0);
    v_conversations_max bigint := coalesce((p_limits ->> 'conversations_per_user_max')::bigint, 0);
    v_bytes_max bigint := coalesce((p_limits ->> 'messages_per_user_bytes_max')::bigint, 0);
BEGIN
    IF p_limits IS NULL THEN
        RETURN;
    END IF;
    SELECT u.* INTO v_usage FROM user_usage u WHERE u.user_id = p_user_id FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        INSERT INTO users (id) VALUES (p_user_id) ON CONFLICT DO NOTHING;
        INSERT INTO user_usage (user_id) VALUES (p_user_id) ON CONFLICT DO NOTHING;
        SELECT u.* INTO v_usage FROM user_usage u WHERE u.user_id = p_user_id FOR NO KEY UPDATE;
    END IF;
    IF EXISTS (SELECT FROM turns t WHERE t.id = p_turn_id) THEN
        RETURN; -- an earlier attempt of the same statement, whose answer was lost, has counted it
    END IF;
    v_now := clock_timestamp();
    v_today := (v_now AT TIME ZONE 'UTC')::date;

    IF p_turn_id IS NOT NULL THEN
        v_usage.running := CASE WHEN v_turns_max > 0 THEN ARRAY(
            SELECT t.id FROM turns t WHERE t.id = ANY (v_usage.running) AND t.finished_at IS NULL) ELSE '{}' END;
        IF v_usage.minute_started_at NOT BETWEEN v_now - interval '1 minute' AND v_now THEN
            v_usage.minute_started_at := v_now;
            v_usage.minute_turns := 0;
        END IF;
        IF v_tokens_max > 0 AND v_usage.day = v_today AND v_usage.day_tokens >= v_tokens_max THEN
            refused_limit := 'tokens_per_user_per_day';
            retry_after_ms := 1000 * extract(epoch FROM ((v_today + 1)::timestamp AT TIME ZONE 'UTC') - v_now);
        ELSIF v_per_minute > 0 AND v_usage.minute_turns >= v_per_minute THEN
            refused_limit := 'turns_per_user_per_minute';
            retry_after_ms := 1000 * extract(epoch FROM v_usage.minute_started_at + interval '1 minute' - v_now);
        ELSIF v_turns_max > 0 AND cardinality(v_usage.running) >= v_turns_max THEN
            refused_limit := 'turns_per_user_max';
            retry_after_ms := 1000;
        END IF;
        IF refused_limit IS NOT NULL THEN
            retry_after_ms := greatest(retry_after_ms, 1);
            RETURN;
        END IF;
        v_usage.minute_turns := v_usage.minute_turns + 1;
        IF v_turns_max > 0 THEN
            v_usage.running := v_usage.running || p_turn_id;
        END IF;
    END IF;

    IF v_conversations_max > 0 AND p_conversations > 0
            AND v_usage.conversations + p_conversations > v_conversations_max THEN
        refused_limit := 'conversations_per_user_max';
    ELSIF v_bytes_max > 0 AND p_bytes > 0 AND v_usage.bytes + p_bytes > v_bytes_max THEN
        refused_limit := 'messages_per_user_bytes_max';
    END IF;
    IF refused_limit IS NOT NULL THEN
        retry_after_ms := CASE WHEN v_usage.measured_at NOT BETWEEN v_now - interval '1 minute' AND v_now THEN 0
            ELSE greatest(1000 * extract(epoch FROM v_usage.measured_at + interval '1 minute' - v_now), 1) END;
        RETURN;
    END IF;

    UPDATE user_usage u
    SET running = v_usage.running, minute_started_at = v_usage.minute_started_at, minute_turns = v_usage.minute_turns,
        conversations = u.conversations + p_conversations, bytes = u.bytes + p_bytes
    WHERE u.user_id = p_user_id;
END
$function$;
