"""Limits of users: what they spend and store is counted, and admissions are decided by it.

Nodes of 0.1.0 call `anynode_admit` and `anynode_history`, which stay: their turns are neither limited nor counted, but
those that end on newer nodes are. The other functions that go are of versions between two releases.
"""

from tortoise.migrations.migration import Migration
from tortoise.migrations.operations import RunSQL

from anynode.models.functions import load_functions

USAGE = """
CREATE TABLE user_usage (
    user_id text PRIMARY KEY REFERENCES users (id) ON DELETE CASCADE,
    running uuid[] NOT NULL DEFAULT '{}',
    minute_started_at timestamptz NOT NULL DEFAULT '-infinity',
    minute_turns integer NOT NULL DEFAULT 0,
    day date NOT NULL DEFAULT '-infinity',
    day_tokens bigint NOT NULL DEFAULT 0,
    conversations bigint NOT NULL DEFAULT 0,
    bytes bigint NOT NULL DEFAULT 0,
    measured_at timestamptz NOT NULL DEFAULT '-infinity'
) WITH (fillfactor = 50);
"""

DROP = """
DROP FUNCTION IF EXISTS
    anynode_admit_to_chat(text, text, uuid, uuid, text, uuid, text, text, timestamptz, uuid, text, double precision,
                          jsonb, jsonb, integer),
    anynode_answer(text, uuid, text, boolean, uuid, timestamptz, text, double precision, integer),
    anynode_regenerate(text, uuid, text, uuid, timestamptz, text, double precision, integer),
    anynode_append(text, uuid, integer, timestamptz, uuid[], text[], text[], jsonb[], text[], text[], jsonb[]);
"""


class Migration(Migration):  # type: ignore[no-redef]
    """Adds the table `user_usage`, and the functions that count and settle."""

    dependencies = [("models", "0008_store")]  # noqa: RUF012
    operations = [  # noqa: RUF012
        RunSQL(USAGE),
        load_functions(
            "count",
            "settle",
            "read_history",
            "history",
            "admit_message",
            "admit",
            "admit_chat_message",
            "answer_question",
            "append_messages",
        ),
        RunSQL(DROP),
    ]
