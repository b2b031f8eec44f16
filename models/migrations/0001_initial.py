"""The first schema: users, conversations, messages, turns, events, and the admission of a message."""

from tortoise.migrations.migration import Migration
from tortoise.migrations.operations import RunSQL

TABLES = """
CREATE TABLE users (
    id text PRIMARY KEY,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE TABLE conversations (
    id uuid PRIMARY KEY,
    user_id text NOT NULL REFERENCES users (id),
    client_id text,
    title text,
    system_prompt text,
    metadata jsonb NOT NULL DEFAULT '{}',
    last_seq bigint NOT NULL DEFAULT 0,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE UNIQUE INDEX conversations_client_id ON conversations (user_id, client_id) WHERE client_id IS NOT NULL;
CREATE INDEX conversations_newest ON conversations (user_id, updated_at DESC, id DESC);

CREATE TABLE messages (
    id uuid PRIMARY KEY,
    conversation_id uuid NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,
    user_id text NOT NULL,
    client_id text,
    position integer NOT NULL,
    role text NOT NULL CHECK (role IN ('system', 'user', 'assistant', 'tool')),
    content text NOT NULL,
    tool_calls jsonb,
    tool_name text,
    tool_call_id text,
    turn_id uuid,
    status text NOT NULL DEFAULT 'completed' CHECK (status IN ('completed', 'cancelled', 'failed', 'superseded')),
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT messages_position UNIQUE (conversation_id, position)
);
CREATE UNIQUE INDEX messages_client_id ON messages (user_id, client_id) WHERE client_id IS NOT NULL;

-- Free room on each page keeps the renewal of a lease a heap-only update.
CREATE TABLE turns (
    id uuid PRIMARY KEY,
    conversation_id uuid NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,
    status text NOT NULL CHECK (status IN ('running', 'completed', 'cancelled', 'failed')),
    node text NOT NULL,
    epoch integer NOT NULL,
    lease_expires_at timestamptz NOT NULL,
    cancel_requested_at timestamptz,
    first_seq bigint,
    error jsonb,
    usage jsonb,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    finished_at timestamptz
) WITH (fillfactor = 70);
CREATE UNIQUE INDEX turns_running ON turns (conversation_id) WHERE status = 'running';
CREATE INDEX turns_conversation ON turns (conversation_id, id);
-- first_seq becomes null when the turn's events have been deleted.
CREATE INDEX turns_in_journal ON turns (finished_at) WHERE first_seq IS NOT NULL;

-- No foreign keys: only admissions and owners of running turns write here, and a check for every row would
-- cost more than the row.
CREATE TABLE events (
    conversation_id uuid NOT NULL,
    seq bigint NOT NULL,
    turn_id uuid,
    epoch integer NOT NULL,
    type text NOT NULL,
    payload jsonb NOT NULL,
    PRIMARY KEY (conversation_id, seq)
);
"""

# The newest messages of a conversation as arrays, the newest first: one row is several times cheaper to hand over
# than a row a message. What plain messages do not have is null as a whole.
HISTORY = """
CREATE FUNCTION anynode_history(
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
          FROM messages m WHERE m.conversation_id = p_conversation_id
          ORDER BY m.position DESC LIMIT p_messages_max) h;
END
$function$;
"""

# A function and not one statement of CTEs: it must see what committed while it waited for the
# conversation's lock, and inside a function every statement takes a new snapshot. It is one round trip and
# one transaction. Repeating it with the same ids is harmless.
ADMIT = """
CREATE FUNCTION anynode_admit(
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
            VALUES (v_conversation_id, p_user_id, p_title, p_created_at, p_created_at);
        ELSE
            IF EXISTS (SELECT FROM turns t WHERE t.conversation_id = v_conversation_id AND t.status = 'running') THEN
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

        INSERT INTO messages
            (id, conversation_id, user_id, client_id, position, role, content, turn_id, status, created_at)
        VALUES (p_message_id, v_conversation_id, p_user_id, p_client_id, v_position + 1, 'user', p_content, p_turn_id,
                'completed', p_created_at)
        ON CONFLICT (user_id, client_id) WHERE client_id IS NOT NULL DO NOTHING;

        IF FOUND THEN
            INSERT INTO turns (id, conversation_id, status, node, epoch, lease_expires_at, first_seq, created_at)
            VALUES (p_turn_id, v_conversation_id, 'running', p_node, 1,
                    clock_timestamp() + make_interval(secs => p_lease_seconds), v_seq + 1, p_created_at);
            INSERT INTO events (conversation_id, seq, turn_id, epoch, type, payload) VALUES
                (v_conversation_id, v_seq + 1, p_turn_id, 1, 'message.created', p_message_created),
                (v_conversation_id, v_seq + 2, p_turn_id, 1, 'turn.started', p_turn_started);
            UPDATE conversations SET last_seq = v_seq + 2, updated_at = p_created_at WHERE id = v_conversation_id;
            v_is_admitted := true;
            anynode_admit.conversation_id := v_conversation_id;
            anynode_admit.turn_id := p_turn_id;
            first_seq := v_seq + 1;
        ELSE
            -- The same message was admitted at the same instant elsewhere; it is committed by now.
            IF p_conversation_id IS NULL THEN
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


class Migration(Migration):  # type: ignore[no-redef]
    """Creates everything."""

    operations = [  # noqa: RUF012
        RunSQL(TABLES, reverse_sql="DROP TABLE events, turns, messages, conversations, users"),
        RunSQL(HISTORY, reverse_sql="DROP FUNCTION anynode_history"),
        RunSQL(ADMIT, reverse_sql="DROP FUNCTION anynode_admit"),
    ]
