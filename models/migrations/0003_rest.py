"""REST: messages and conversations that are written without a turn, and turns that are read by their id."""

from tortoise.migrations.migration import Migration
from tortoise.migrations.operations import RunSQL

# `position` is that of a turn's question, behind which its answer is found; null for turns from before. A deletion is
# remembered for a moment, until the watch of every node has seen it. `written_at` says when an event may be deleted
# that belongs to no turn; those of turns have none, which costs them nothing, and are not in its index. All of it is
# quick: `messages`, which is large and must not stand still, gets no index; `events`, which all flushes need, comes
# last.
TURNS = """
CREATE TABLE deletions (
    conversation_id uuid PRIMARY KEY,
    changed_xid bigint NOT NULL DEFAULT pg_current_xact_id()::text::bigint,
    deleted_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX deletions_changed ON deletions (changed_xid);
ALTER TABLE turns ADD COLUMN position integer;
"""
EVENTS = """
ALTER TABLE events ADD COLUMN written_at timestamptz;
CREATE INDEX events_without_turn ON events (written_at) WHERE turn_id IS NULL;
"""

# The function of 0002, which now also refuses a question while calls wait for their results, and gives a conversation
# without a title one. `last_role` is set where the question is refused, or by the way.
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
    v_has_calls boolean;
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
            SELECT m.position, m.role, m.tool_calls IS NOT NULL INTO v_position, anynode_admit.last_role, v_has_calls
            FROM messages m WHERE m.conversation_id = v_conversation_id ORDER BY m.position DESC LIMIT 1;
            IF NOT FOUND THEN
                v_position := 0;
            ELSIF last_role NOT IN ('assistant', 'system') OR v_has_calls THEN
                outcome := 'role_order';
                anynode_admit.conversation_id := v_conversation_id;
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
            INSERT INTO turns
                (id, conversation_id, status, node, epoch, lease_expires_at, first_seq, created_at, position)
            VALUES (p_turn_id, v_conversation_id, 'running', p_node, 1,
                    clock_timestamp() + make_interval(secs => p_lease_seconds), v_seq + 1, p_created_at,
                    v_position + 1);
            INSERT INTO events (conversation_id, seq, turn_id, epoch, type, payload) VALUES
                (v_conversation_id, v_seq + 1, p_turn_id, 1, 'message.created', p_message_created),
                (v_conversation_id, v_seq + 2, p_turn_id, 1, 'turn.started', p_turn_started);
            UPDATE conversations
            SET last_seq = v_seq + 2, updated_at = greatest(updated_at, p_created_at), title = coalesce(title, p_title),
                changed_xid = pg_current_xact_id()::text::bigint
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

# The function of 0002, which now notes the position of the question.
REGENERATE = """
CREATE OR REPLACE FUNCTION anynode_regenerate(
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
        INSERT INTO turns (id, conversation_id, status, node, epoch, lease_expires_at, first_seq, created_at, position)
        VALUES (p_turn_id, p_conversation_id, 'running', p_node, 1,
                clock_timestamp() + make_interval(secs => p_lease_seconds), v_seq + 1, p_created_at, v_position);
        INSERT INTO events (conversation_id, seq, turn_id, epoch, type, payload)
        VALUES (p_conversation_id, v_seq + 1, p_turn_id, 1, 'turn.started',
                jsonb_build_object('message_id', anynode_regenerate.client_id));
        UPDATE conversations
        SET last_seq = v_seq + 1, updated_at = greatest(updated_at, p_created_at),
            changed_xid = pg_current_xact_id()::text::bigint
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

# Messages that come without a turn. Whether their roles are in order was decided (`models/rules.py`) for a conversation
# whose last message is at `p_position`; here that is made sure of, under the lock. Repeating it with the same ids is
# harmless.
APPEND = """
CREATE FUNCTION anynode_append(
    p_user_id text, p_conversation_id uuid, p_position integer, p_created_at timestamptz,
    p_ids uuid[], p_roles text[], p_contents text[], p_tool_calls jsonb[], p_tool_names text[],
    p_tool_call_ids text[], p_payloads jsonb[],
    OUT outcome text, OUT last_seq bigint
) LANGUAGE plpgsql AS $function$
#variable_conflict use_column
BEGIN
    SELECT c.last_seq INTO anynode_append.last_seq
    FROM conversations c WHERE c.id = p_conversation_id AND c.user_id = p_user_id
    FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        outcome := 'not_found';
    ELSIF EXISTS (SELECT FROM messages m WHERE m.id = p_ids[1]) THEN
        outcome := 'appended';
        anynode_append.last_seq := coalesce(
            (SELECT e.seq FROM events e
             WHERE e.conversation_id = p_conversation_id AND e.turn_id IS NULL
                 AND e.payload #>> '{message,id}' = p_ids[cardinality(p_ids)]::text
             ORDER BY e.seq DESC LIMIT 1),
            anynode_append.last_seq);
    ELSIF EXISTS (SELECT FROM turns t WHERE t.conversation_id = p_conversation_id AND t.status = 'running') THEN
        outcome := 'conversation_busy';
    ELSIF p_position <> coalesce(
        (SELECT max(m.position) FROM messages m WHERE m.conversation_id = p_conversation_id), 0) THEN
        outcome := 'moved';
    ELSE
        INSERT INTO messages (id, conversation_id, user_id, position, role, content, tool_calls, tool_name,
                              tool_call_id, status, created_at)
        SELECT n.id, p_conversation_id, p_user_id, p_position + n.number, n.role, n.content, n.tool_calls, n.tool_name,
               n.tool_call_id, 'completed', p_created_at
        FROM unnest(p_ids, p_roles, p_contents, p_tool_calls, p_tool_names, p_tool_call_ids) WITH ORDINALITY
            AS n (id, role, content, tool_calls, tool_name, tool_call_id, number);
        INSERT INTO events (conversation_id, seq, epoch, type, payload, written_at)
        SELECT p_conversation_id, anynode_append.last_seq + n.number, 0, 'message.created', n.payload,
               clock_timestamp()
        FROM unnest(p_payloads) WITH ORDINALITY AS n (payload, number);
        anynode_append.last_seq := anynode_append.last_seq + cardinality(p_ids);
        UPDATE conversations c
        SET last_seq = anynode_append.last_seq, updated_at = greatest(updated_at, p_created_at),
            changed_xid = pg_current_xact_id()::text::bigint
        WHERE c.id = p_conversation_id;
        outcome := 'appended';
    END IF;
END
$function$;
"""

# A conversation and all that belongs to it. While a turn runs nothing is deleted, unless `p_is_forced`: its owner then
# finds its writes refused. The turn is locked first: a flush holds a turn when it asks for the conversation. Under both
# locks it is looked again, for a turn may have been admitted meanwhile. Every statement of a function takes a new
# snapshot, so what a flush wrote in the meantime is deleted too.
DELETE = """
CREATE FUNCTION anynode_delete(
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
"""


class Migration(Migration):  # type: ignore[no-redef]
    """What REST needs."""

    dependencies = [("models", "0002_many_nodes")]  # noqa: RUF012
    operations = [  # noqa: RUF012
        RunSQL(TURNS, reverse_sql="ALTER TABLE turns DROP COLUMN position; DROP TABLE deletions"),
        RunSQL(ADMIT),
        RunSQL(REGENERATE),
        RunSQL(APPEND, reverse_sql="DROP FUNCTION anynode_append"),
        RunSQL(DELETE, reverse_sql="DROP FUNCTION anynode_delete"),
        RunSQL(EVENTS, reverse_sql="DROP INDEX events_without_turn; ALTER TABLE events DROP COLUMN written_at"),
    ]
