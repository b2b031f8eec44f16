-- anynode_settle: add to what users have spent and stored when their turns have ended.
--
-- Does: adds the tokens of ended turns to the day of today, and the bytes of their messages to what is stored. A user
--     for whom nothing was counted before has no row, and gets none. Returns no rows.
-- Locks: the users' rows of `user_usage`, in the order of their ids. Flushes hold turns and conversations by then, and
--     what waits for those has no row of `user_usage` locked.
-- Repeating: adds again. Called in a flush, which adds nothing when it is repeated.
-- Called by: `flush_with_endings`.

CREATE OR REPLACE FUNCTION anynode_settle(p_user_ids text[], p_tokens bigint[], p_bytes bigint[])
RETURNS SETOF uuid LANGUAGE plpgsql AS $function$
DECLARE
    v_spent record;
    v_today date := (clock_timestamp() AT TIME ZONE 'UTC')::date;
BEGIN
    FOR v_spent IN
        SELECT s.user_id, sum(s.tokens)::bigint AS tokens, sum(s.bytes)::bigint AS bytes
        FROM unnest(p_user_ids, p_tokens, p_bytes) AS s (user_id, tokens, bytes) GROUP BY s.user_id ORDER BY s.user_id
    LOOP
        UPDATE user_usage u
        SET day = v_today, day_tokens = CASE WHEN u.day = v_today THEN u.day_tokens ELSE 0 END + v_spent.tokens,
            bytes = u.bytes + v_spent.bytes
        WHERE u.user_id = v_spent.user_id;
    END LOOP;
END
$function$;
