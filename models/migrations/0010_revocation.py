"""Revocations of tokens, and tickets that know when their tokens were issued and what they allow.

A node of an older release does not know revocations, and issues tickets without the new columns. Those are refused
where anything was revoked for their user.
"""

from tortoise.migrations.migration import Migration
from tortoise.migrations.operations import RunSQL

from anynode.models.functions import load_functions

REVOCATIONS = """
CREATE TABLE revocations (
    user_hash text PRIMARY KEY,
    not_before double precision NOT NULL,
    changed_xid bigint NOT NULL DEFAULT pg_current_xact_id()::text::bigint
);
CREATE INDEX revocations_changed ON revocations (changed_xid);
CREATE INDEX revocations_expired ON revocations (not_before);
"""

TICKETS = """
ALTER TABLE tickets ADD COLUMN issued_at double precision;
ALTER TABLE tickets ADD COLUMN limits jsonb;
"""


class Migration(Migration):  # type: ignore[no-redef]
    """Adds `revocations` with the trigger of deleted users, `tickets.issued_at` and `tickets.limits`."""

    dependencies = [("models", "0009_fair")]  # noqa: RUF012
    operations = [  # noqa: RUF012
        RunSQL(REVOCATIONS),
        RunSQL(TICKETS),
        load_functions("revoke_deleted"),
    ]
