-- The schema as it is: what all migrations together make. It is here to be read; databases are made by `anynode migrate`.
-- tests/database/test_schema.py loads this file and models/functions/*.sql, and compares the two databases exactly.
-- The functions are in models/functions/, one file each; they need these tables, and these tables need none of them.

CREATE TABLE users (
    id text PRIMARY KEY, -- the `sub` of a token
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    email text -- the `email` of the newest token that had one
);

-- What each user has spent and stored, by which admissions are limited. Free room on each page keeps an update a
-- heap-only one.
CREATE TABLE user_usage (
    user_id text PRIMARY KEY REFERENCES users (id) ON DELETE CASCADE,
    running uuid[] NOT NULL DEFAULT '{}', -- the turns that ran when this was written, and perhaps still do
    minute_started_at timestamptz NOT NULL DEFAULT '-infinity',
    minute_turns integer NOT NULL DEFAULT 0, -- that have begun in this minute
    day date NOT NULL DEFAULT '-infinity', -- UTC
    day_tokens bigint NOT NULL DEFAULT 0, -- of turns that have ended on this day
    conversations bigint NOT NULL DEFAULT 0, -- added up since they were measured; what was deleted is still in it …
    bytes bigint NOT NULL DEFAULT 0, -- … as it is in this, the bytes of messages, system prompts and metadata
    measured_at timestamptz NOT NULL DEFAULT '-infinity'
) WITH (fillfactor = 50);

CREATE TABLE conversations (
    id uuid PRIMARY KEY,
    user_id text NOT NULL REFERENCES users (id),
    client_id text, -- the id that an outside client has given it
    title text,
    system_prompt text, -- a message of role system at position 1 comes before it
    metadata jsonb NOT NULL DEFAULT '{}',
    last_seq bigint NOT NULL DEFAULT 0, -- of the last event; while a turn runs, of its `turn.started`
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp(), -- the last activity
    -- The transaction that last began a turn. A reader that has seen all transactions before a snapshot's xmin finds
    -- every later change by this column's index, in whatever order the transactions commit.
    changed_xid bigint NOT NULL DEFAULT pg_current_xact_id()::text::bigint
);
CREATE UNIQUE INDEX conversations_client_id ON conversations (user_id, client_id) WHERE client_id IS NOT NULL;
CREATE INDEX conversations_newest ON conversations (user_id, updated_at DESC, id DESC);
CREATE INDEX conversations_changed ON conversations (changed_xid);

CREATE TABLE messages (
    id uuid PRIMARY KEY,
    conversation_id uuid NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,
    user_id text NOT NULL, -- the conversation's, for the index of clients' ids
    client_id text, -- the id that the client has given it: `message_id` on the wire
    position integer NOT NULL, -- in the conversation, from 1, without a gap
    role text NOT NULL CHECK (role IN ('system', 'user', 'assistant', 'tool')),
    content text NOT NULL,
    tool_calls jsonb,
    tool_name text,
    tool_call_id text,
    turn_id uuid, -- a question's is that of its newest answer
    status text NOT NULL DEFAULT 'completed' CHECK (status IN ('completed', 'cancelled', 'failed', 'superseded')),
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT messages_position UNIQUE (conversation_id, position)
);
CREATE UNIQUE INDEX messages_client_id ON messages (user_id, client_id) WHERE client_id IS NOT NULL;

-- A turn and its lease. Free room on each page keeps the renewal of a lease a heap-only update.
CREATE TABLE turns (
    id uuid PRIMARY KEY,
    conversation_id uuid NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,
    status text NOT NULL CHECK (status IN ('running', 'completed', 'cancelled', 'failed')),
    node text NOT NULL, -- the owner
    epoch integer NOT NULL, -- counts the owners
    lease_expires_at timestamptz NOT NULL, -- '-infinity': handed over
    cancel_requested_at timestamptz,
    first_seq bigint, -- of its first event; null once its events have been deleted
    error jsonb,
    usage jsonb,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    finished_at timestamptz, -- null while it runs
    attempts integer NOT NULL DEFAULT 1, -- the attempts begun; being handed over begins none
    position integer -- of its question; null for turns from before migration 0003
) WITH (fillfactor = 70);
CREATE UNIQUE INDEX turns_running ON turns (conversation_id) WHERE status = 'running';
CREATE INDEX turns_conversation ON turns (conversation_id, id);
CREATE INDEX turns_in_journal ON turns (finished_at) WHERE first_seq IS NOT NULL;
-- Almost empty: turns that run and have been asked to stop.
CREATE INDEX turns_to_cancel ON turns (node) WHERE status = 'running' AND cancel_requested_at IS NOT NULL;

-- The journal. It has no foreign keys: only admissions and the owners of running turns write here, and a check for every
-- row would cost more than the row. It is never truncated: an empty table of no pages would look small enough to be read
-- as a whole, to plans that are kept for long.
CREATE TABLE events (
    conversation_id uuid NOT NULL,
    seq bigint NOT NULL, -- in the conversation, from 1, without a gap
    turn_id uuid, -- null: a message that came without a turn
    epoch integer NOT NULL, -- of the owner that wrote it
    type text NOT NULL,
    payload jsonb NOT NULL,
    written_at timestamptz, -- by which an event without a turn expires; null for those of turns
    PRIMARY KEY (conversation_id, seq)
) WITH (vacuum_truncate = off);
CREATE INDEX events_without_turn ON events (written_at) WHERE turn_id IS NULL;

-- Conversations that were deleted a moment ago: remembered until the watch of every node has seen them.
CREATE TABLE deletions (
    conversation_id uuid PRIMARY KEY,
    changed_xid bigint NOT NULL DEFAULT pg_current_xact_id()::text::bigint,
    deleted_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX deletions_changed ON deletions (changed_xid);

-- Tickets that nobody has used yet. A reader of the table cannot connect: it holds only their hashes.
CREATE TABLE tickets (
    hash text PRIMARY KEY, -- SHA-256 of the ticket, in hexadecimal
    user_id text NOT NULL,
    token_expires_at double precision NOT NULL, -- Unix seconds
    expires_at timestamptz NOT NULL,
    issued_at double precision, -- of the token; null from a node of a release before migration 0010
    limits jsonb -- of the token's user
);
CREATE INDEX tickets_user ON tickets (user_id, expires_at);
CREATE INDEX tickets_expired ON tickets (expires_at);

-- From when on the tokens of a user must have been issued. The trigger `users_revoke_deleted`, which stands beside its
-- function, writes a row for each user who is deleted; nothing else is left of that user.
CREATE TABLE revocations (
    user_hash text PRIMARY KEY, -- SHA-256 of the user's id, in hexadecimal; `*`: of all users
    not_before double precision NOT NULL, -- Unix seconds, by the database's clock
    changed_xid bigint NOT NULL DEFAULT pg_current_xact_id()::text::bigint
);
CREATE INDEX revocations_changed ON revocations (changed_xid);
CREATE INDEX revocations_expired ON revocations (not_before);
