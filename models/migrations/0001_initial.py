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

# A function and not one statement of CTEs: it must see what committed while it waited for the
# conversation's lock, and inside a function every statement takes a new snapshot. It is one round trip and
# one transaction. Repeating it with the same ids is harmless.
ADMIT = """
CREATE FUNCTION anynode_admit(
    p_user_id text, p_conversation_id uuid, p_new_conversation_id uuid, p_title text,
    p_message_id uuid, p_client_id text, p_content text, p_created_at timestamptz,
    p_turn_id uuid, p_node text, p_lease_seconds double precision,
    p_message_created jsonb, p_turn_started jsonb, p_history_messages_max integer
) RETURNS TABLE (
    outcome text, conversation_id uuid, turn_id uuid, seq bigint, "position" integer,
    role text, content text, tool_calls jsonb, tool_name text, tool_call_id text, status text
) LANGUAGE plpgsql AS $function$
#variable_conflict use_column
DECLARE
    v_conversation_id uuid := p_conversation_id;
    v_system_prompt text;
    v_seq bigint := 0;
    v_position integer := 0;
    v_role text;
    v_admitted_in uuid; -- the conversation, turn and position that the message has
    v_turn_id uuid;
    v_admitted_at integer;
BEGIN
    IF v_conversation_id IS NOT NULL THEN
        SELECT c.last_seq, c.system_prompt INTO v_seq, v_system_prompt
        FROM conversations c WHERE c.id = v_conversation_id AND c.user_id = p_user_id
        FOR NO KEY UPDATE;
        IF NOT FOUND THEN
            RETURN QUERY SELECT 'not_found', v_conversation_id, NULL::uuid, NULL::bigint, NULL::integer,
                NULL::text, NULL::text, NULL::jsonb, NULL::text, NULL::text, NULL::text;
            RETURN;
        END IF;
    END IF;

    SELECT m.conversation_id, m.turn_id, m.position INTO v_admitted_in, v_turn_id, v_admitted_at
    FROM messages m WHERE m.user_id = p_user_id AND m.client_id = p_client_id;

    IF NOT FOUND THEN
        IF v_conversation_id IS NULL THEN
            v_conversation_id := p_new_conversation_id;
            INSERT INTO users (id) VALUES (p_user_id) ON CONFLICT DO NOTHING;
            INSERT INTO conversations (id, user_id, title, created_at, updated_at)
            VALUES (v_conversation_id, p_user_id, p_title, p_created_at, p_created_at);
        ELSE
            IF EXISTS (SELECT FROM turns t WHERE t.conversation_id = v_conversation_id AND t.status = 'running') THEN
                RETURN QUERY SELECT 'conversation_busy', v_conversation_id, NULL::uuid, NULL::bigint, NULL::integer,
                    NULL::text, NULL::text, NULL::jsonb, NULL::text, NULL::text, NULL::text;
                RETURN;
            END IF;
            SELECT m.position, m.role INTO v_position, v_role
            FROM messages m WHERE m.conversation_id = v_conversation_id ORDER BY m.position DESC LIMIT 1;
            IF NOT FOUND THEN
                v_position := 0;
            ELSIF v_role NOT IN ('assistant', 'system') THEN
                RETURN QUERY SELECT 'role_order', v_conversation_id, NULL::uuid, NULL::bigint, NULL::integer,
                    v_role, NULL::text, NULL::jsonb, NULL::text, NULL::text, NULL::text;
                RETURN;
            END IF;
        END IF;

        v_position := v_position + 1;
        INSERT INTO messages
            (id, conversation_id, user_id, client_id, position, role, content, turn_id, status, created_at)
        VALUES (p_message_id, v_conversation_id, p_user_id, p_client_id, v_position, 'user', p_content, p_turn_id,
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
            v_admitted_in := v_conversation_id;
            v_turn_id := p_turn_id;
            v_admitted_at := v_position;
        ELSE
            -- The same message was admitted at the same instant elsewhere; it is committed by now.
            IF p_conversation_id IS NULL THEN
                DELETE FROM conversations WHERE id = v_conversation_id;
            END IF;
            SELECT m.conversation_id, m.turn_id, m.position INTO v_admitted_in, v_turn_id, v_admitted_at
            FROM messages m WHERE m.user_id = p_user_id AND m.client_id = p_client_id;
        END IF;
    END IF;

    IF v_turn_id IS DISTINCT FROM p_turn_id THEN
        RETURN QUERY SELECT
            CASE WHEN p_conversation_id <> v_admitted_in THEN 'message_id_taken' ELSE 'repeated' END,
            v_admitted_in, v_turn_id,
            (SELECT t.first_seq FROM turns t WHERE t.id = v_turn_id), v_admitted_at,
            NULL::text, NULL::text, NULL::jsonb, NULL::text, NULL::text, NULL::text;
        RETURN;
    END IF;

    RETURN QUERY SELECT 'admitted', v_admitted_in, p_turn_id,
        (SELECT t.first_seq FROM turns t WHERE t.id = p_turn_id), v_admitted_at, 'system',
        coalesce((SELECT m.content FROM messages m WHERE m.conversation_id = v_admitted_in
                  AND m.position = 1 AND m.role = 'system'), v_system_prompt),
        NULL::jsonb, NULL::text, NULL::text, NULL::text;
    RETURN QUERY SELECT NULL::text, NULL::uuid, h.turn_id, NULL::bigint, h.position,
            h.role, h.content, h.tool_calls, h.tool_name, h.tool_call_id, h.status
        FROM (SELECT m.turn_id, m.position, m.role, m.content, m.tool_calls, m.tool_name, m.tool_call_id, m.status
              FROM messages m WHERE m.conversation_id = v_admitted_in
              ORDER BY m.position DESC LIMIT p_history_messages_max) h
        ORDER BY h.position;
END
$function$;
"""


class Migration(Migration):  # type: ignore[no-redef]
    """Creates everything."""

    operations = [  # noqa: RUF012
        RunSQL(TABLES, reverse_sql="DROP TABLE events, turns, messages, conversations, users"),
        RunSQL(ADMIT, reverse_sql="DROP FUNCTION anynode_admit"),
    ]
