"""Many nodes: what changed elsewhere, which turns are to be cancelled, taking turns over, answering once more."""

from tortoise.migrations.migration import Migration
from tortoise.migrations.operations import RunSQL

# `changed_xid` is the transaction that last began a turn. A node that has seen all transactions before a snapshot's
# xmin finds every later change by this index, in whatever order they commit.
# The second index holds next to nothing: turns that run and have been asked to stop. `attempts` counts the nodes that
# have died of a turn; a node that hands its turns over does not count, so it is not the epoch.
# An empty `events` that is cut to no page would look small enough to be read whole, to plans that are kept for long.
COLUMNS = """
ALTER TABLE conversations ADD COLUMN changed_xid bigint NOT NULL DEFAULT pg_current_xact_id()::text::bigint;
CREATE INDEX conversations_changed ON conversations (changed_xid);
ALTER TABLE events SET (vacuum_truncate = off);
ALTER TABLE turns ADD COLUMN attempts integer NOT NULL DEFAULT 1;
CREATE INDEX turns_to_cancel ON turns (node) WHERE status = 'running' AND cancel_requested_at IS NOT NULL;
"""

# The function of 0001, without superseded messages: they would push others out.
HISTORY = """
CREATE OR REPLACE FUNCTION anynode_history(
    p_conversation_id uuid, p_messages_max integer,
    OUT roles text[], OUT contents text[], OUT statuses text[], OUT turn_ids uuid[],
    OUT tool_calls jsonb[], OUT tool_names text[], OUT tool_call_ids text[]
) LANGUAGE plpgsql STABLE AS $function$
BEGIN
    SELECT array_agg(h.role), array_agg(h.content),
           CASE WHEN bool_or(h.status <> 'completed') THEN array_agg(h.status) END,
           CASE WHEN bool_or(h.status <> 'completed') THEN array_agg(h.turn_id) END,
           CASE WHEN bool_or(h.tool_calls IS NOT NULL) THEN array_agg(h.tool_calls) END,
           CASE WHEN bool_or(h.tool_name IS NOT NULL) THEN array_agg(h.tool_name) END,
           CASE WHEN bool_or(h.tool_call_id IS NOT NULL) THEN array_agg(h.tool_call_id) END
    INTO roles, contents, statuses, turn_ids, tool_calls, tool_names, tool_call_ids
    FROM (SELECT m.role, m.content, m.status, m.turn_id, m.tool_calls, m.tool_name, m.tool_call_id
          FROM messages m WHERE m.conversation_id = p_conversation_id AND m.status <> 'superseded'
          ORDER BY m.position DESC LIMIT p_messages_max) h;
END
$function$;
"""

# The function of 0001, which now may meet its own first attempt while that commits, keeps `changed_xid`, and tells who
# is busy the turn that runs.
ADMIT = """
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
#variable_conflict use_column
DECLARE
    v_seq bigint := 0;
    v_position integer := 0;
    v_conversation_id uuid := p_conversation_id;
    v_system_prompt text;
    v_last_role text;
    v_is_admitted boolean := false;
    v_is_repeated boolean := false;
BEGIN
    IF v_conversation_id IS NOT NULL THEN
        SELECT c.last_seq, c.system_prompt INTO v_seq, v_system_prompt
        FROM conversations c WHERE c.id = v_conversation_id AND c.user_id = p_user_id
        FOR NO KEY UPDATE;
        IF NOT FOUND THEN
            outcome := 'not_found';
            anynode_admit.conversation_id := v_conversation_id;
            RETURN;
        END IF;
    END IF;

    SELECT m.conversation_id, m.turn_id INTO anynode_admit.conversation_id, anynode_admit.turn_id
    FROM messages m WHERE m.user_id = p_user_id AND m.client_id = p_client_id;

    IF NOT FOUND THEN
        IF v_conversation_id IS NULL THEN
            v_conversation_id := p_new_conversation_id;
            INSERT INTO users (id) VALUES (p_user_id) ON CONFLICT DO NOTHING;
            INSERT INTO conversations (id, user_id, title, created_at, updated_at)
            VALUES (v_conversation_id, p_user_id, p_title, p_created_at, p_created_at)
            ON CONFLICT (id) DO NOTHING;
            v_is_repeated := NOT FOUND;
        ELSE
            SELECT t.id INTO anynode_admit.turn_id
            FROM turns t WHERE t.conversation_id = v_conversation_id AND t.status = 'running';
            IF FOUND THEN
                outcome := 'conversation_busy';
                anynode_admit.conversation_id := v_conversation_id;
                RETURN;
            END IF;
            SELECT m.position, m.role INTO v_position, v_last_role
            FROM messages m WHERE m.conversation_id = v_conversation_id ORDER BY m.position DESC LIMIT 1;
            IF NOT FOUND THEN
                v_position := 0;
            ELSIF v_last_role NOT IN ('assistant', 'system') THEN
                outcome := 'role_order';
                anynode_admit.conversation_id := v_conversation_id;
                last_role := v_last_role;
                RETURN;
            END IF;
        END IF;

        IF NOT v_is_repeated THEN
            INSERT INTO messages
                (id, conversation_id, user_id, client_id, position, role, content, turn_id, status, created_at)
            VALUES (p_message_id, v_conversation_id, p_user_id, p_client_id, v_position + 1, 'user', p_content,
                    p_turn_id, 'completed', p_created_at)
            ON CONFLICT (user_id, client_id) WHERE client_id IS NOT NULL DO NOTHING;
            v_is_admitted := FOUND;
        END IF;

        IF v_is_admitted THEN
            INSERT INTO turns (id, conversation_id, status, node, epoch, lease_expires_at, first_seq, created_at)
            VALUES (p_turn_id, v_conversation_id, 'running', p_node, 1,
                    clock_timestamp() + make_interval(secs => p_lease_seconds), v_seq + 1, p_created_at);
            INSERT INTO events (conversation_id, seq, turn_id, epoch, type, payload) VALUES
                (v_conversation_id, v_seq + 1, p_turn_id, 1, 'message.created', p_message_created),
                (v_conversation_id, v_seq + 2, p_turn_id, 1, 'turn.started', p_turn_started);
            UPDATE conversations
            SET last_seq = v_seq + 2, updated_at = p_created_at, changed_xid = pg_current_xact_id()::text::bigint
            WHERE id = v_conversation_id;
            anynode_admit.conversation_id := v_conversation_id;
            anynode_admit.turn_id := p_turn_id;
            first_seq := v_seq + 1;
        ELSE
            -- The same message was admitted at the same instant elsewhere; it is committed by now.
            IF p_conversation_id IS NULL AND NOT v_is_repeated THEN
                DELETE FROM conversations WHERE id = v_conversation_id;
            END IF;
            SELECT m.conversation_id, m.turn_id INTO anynode_admit.conversation_id, anynode_admit.turn_id
            FROM messages m WHERE m.user_id = p_user_id AND m.client_id = p_client_id;
        END IF;
    END IF;

    IF NOT v_is_admitted THEN
        SELECT t.first_seq INTO anynode_admit.first_seq FROM turns t WHERE t.id = anynode_admit.turn_id;
        IF anynode_admit.turn_id IS DISTINCT FROM p_turn_id THEN
            outcome := CASE WHEN p_conversation_id <> anynode_admit.conversation_id THEN 'message_id_taken'
                            ELSE 'repeated' END;
            RETURN;
        END IF;
    END IF;

    outcome := 'admitted';
    system_prompt := v_system_prompt;
    IF v_is_admitted AND v_position = 0 THEN
        roles := ARRAY['user'];
        contents := ARRAY[p_content];
        RETURN;
    END IF;
    SELECT coalesce(m.content, v_system_prompt) INTO anynode_admit.system_prompt
    FROM (VALUES (true)) AS always LEFT JOIN messages m
        ON m.conversation_id = anynode_admit.conversation_id AND m.position = 1 AND m.role = 'system';
    SELECT h.* INTO anynode_admit.roles, anynode_admit.contents, anynode_admit.statuses, anynode_admit.turn_ids,
        anynode_admit.tool_calls, anynode_admit.tool_names, anynode_admit.tool_call_ids
    FROM anynode_history(anynode_admit.conversation_id, p_history_messages_max) h;
END
$function$;
"""

# The last question, answered again: what answered it before is superseded. Repeating it with the same `p_turn_id` is
# harmless.
REGENERATE = """
CREATE FUNCTION anynode_regenerate(
    p_user_id text, p_conversation_id uuid, p_client_id text, p_turn_id uuid, p_created_at timestamptz,
    p_node text, p_lease_seconds double precision, p_history_messages_max integer,
    OUT outcome text, OUT conversation_id uuid, OUT turn_id uuid, OUT first_seq bigint,
    OUT last_role text, OUT system_prompt text, OUT client_id text,
    OUT roles text[], OUT contents text[], OUT statuses text[], OUT turn_ids uuid[],
    OUT tool_calls jsonb[], OUT tool_names text[], OUT tool_call_ids text[]
) LANGUAGE plpgsql AS $function$
#variable_conflict use_column
DECLARE
    v_seq bigint;
    v_position integer;
BEGIN
    anynode_regenerate.conversation_id := p_conversation_id;
    SELECT c.last_seq, c.system_prompt INTO v_seq, anynode_regenerate.system_prompt
    FROM conversations c WHERE c.id = p_conversation_id AND c.user_id = p_user_id
    FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        outcome := 'not_found';
        RETURN;
    END IF;

    SELECT t.id, t.first_seq INTO anynode_regenerate.turn_id, anynode_regenerate.first_seq
    FROM turns t WHERE t.id = p_turn_id AND t.conversation_id = p_conversation_id;
    IF NOT FOUND THEN
        SELECT t.id INTO anynode_regenerate.turn_id
        FROM turns t WHERE t.conversation_id = p_conversation_id AND t.status = 'running';
        IF FOUND THEN
            outcome := 'conversation_busy';
            RETURN;
        END IF;
        SELECT m.position, coalesce(m.client_id, m.id::text) INTO v_position, anynode_regenerate.client_id
        FROM messages m WHERE m.conversation_id = p_conversation_id AND m.role = 'user'
        ORDER BY m.position DESC LIMIT 1;
        IF NOT FOUND THEN
            outcome := 'role_order';
            RETURN;
        END IF;
        IF p_client_id <> anynode_regenerate.client_id THEN
            outcome := 'not_last';
            RETURN;
        END IF;

        UPDATE messages m SET status = 'superseded'
        WHERE m.conversation_id = p_conversation_id AND m.position > v_position AND m.status <> 'superseded';
        UPDATE messages m SET turn_id = p_turn_id
        WHERE m.conversation_id = p_conversation_id AND m.position = v_position;
        INSERT INTO turns (id, conversation_id, status, node, epoch, lease_expires_at, first_seq, created_at)
        VALUES (p_turn_id, p_conversation_id, 'running', p_node, 1,
                clock_timestamp() + make_interval(secs => p_lease_seconds), v_seq + 1, p_created_at);
        INSERT INTO events (conversation_id, seq, turn_id, epoch, type, payload)
        VALUES (p_conversation_id, v_seq + 1, p_turn_id, 1, 'turn.started',
                jsonb_build_object('message_id', anynode_regenerate.client_id));
        UPDATE conversations
        SET last_seq = v_seq + 1, updated_at = p_created_at, changed_xid = pg_current_xact_id()::text::bigint
        WHERE id = p_conversation_id;
        anynode_regenerate.turn_id := p_turn_id;
        anynode_regenerate.first_seq := v_seq + 1;
    ELSE
        SELECT e.payload ->> 'message_id' INTO anynode_regenerate.client_id
        FROM events e WHERE e.conversation_id = p_conversation_id AND e.seq = anynode_regenerate.first_seq;
    END IF;

    outcome := 'admitted';
    SELECT coalesce(m.content, anynode_regenerate.system_prompt) INTO anynode_regenerate.system_prompt
    FROM (VALUES (true)) AS always LEFT JOIN messages m
        ON m.conversation_id = p_conversation_id AND m.position = 1 AND m.role = 'system';
    SELECT h.* INTO anynode_regenerate.roles, anynode_regenerate.contents, anynode_regenerate.statuses,
        anynode_regenerate.turn_ids, anynode_regenerate.tool_calls, anynode_regenerate.tool_names,
        anynode_regenerate.tool_call_ids
    FROM anynode_history(p_conversation_id, p_history_messages_max) h;
END
$function$;
"""

# Turns whose lease has run out become a node's, under the next epoch; `turn.restarted` commits with it. What stands of
# a turn is what was said up to its last tool result, for then a step was complete; all of it where the agent
# continues, or where the turn is only to be ended. Also taken are the node's own that it does not know of, and so has
# not renewed for two beats: the answer that would have told it was lost. A turn that was handed over is no new attempt.
# A function: the journal must be read after the turn is locked, when the old owner can append no more, and inside a
# function every statement takes a new snapshot.
TAKE_OVER = """
CREATE FUNCTION anynode_take_over(
    p_node text, p_known uuid[], p_lease_seconds double precision, p_turns_max integer, p_attempts_max integer,
    p_can_continue boolean, p_two_beats double precision
) RETURNS TABLE (
    turn_id uuid, conversation_id uuid, user_id text, epoch integer, cancel_requested boolean, is_exhausted boolean,
    seq bigint, text text, types text[], payloads jsonb[]
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
        UPDATE turns t
        SET node = p_node, epoch = v_turn.epoch, attempts = v_turn.attempts,
            lease_expires_at = clock_timestamp() + make_interval(secs => p_lease_seconds)
        WHERE t.id = v_turn.id;
        SELECT c.user_id INTO anynode_take_over.user_id FROM conversations c WHERE c.id = v_turn.conversation_id;

        SELECT max(e.seq) + 1, max(e.seq) FILTER (
                   WHERE e.type = 'turn.tool_result' OR p_can_continue OR cancel_requested OR is_exhausted)
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
"""


class Migration(Migration):  # type: ignore[no-redef]
    """What many nodes need of each other."""

    dependencies = [("models", "0001_initial")]  # noqa: RUF012
    operations = [  # noqa: RUF012
        RunSQL(
            COLUMNS,
            reverse_sql="DROP INDEX turns_to_cancel; ALTER TABLE turns DROP COLUMN attempts;"
            " ALTER TABLE events RESET (vacuum_truncate); ALTER TABLE conversations DROP COLUMN changed_xid",
        ),
        RunSQL(HISTORY),
        RunSQL(ADMIT),
        RunSQL(REGENERATE, reverse_sql="DROP FUNCTION anynode_regenerate"),
        RunSQL(TAKE_OVER, reverse_sql="DROP FUNCTION anynode_take_over"),
    ]
