"""Turns that a `Store` has run, and the e-mail addresses of users.

`anynode_take_over` takes the place of `anynode_take_over_turns`, and is also told of one conversation. Only a version
between two releases called the latter: 0.1.0 takes turns over by a statement of its own.
"""

from tortoise.migrations.migration import Migration
from tortoise.migrations.operations import RunSQL

from anynode.models.functions import load_functions

# Null for a user whose token does not say it. Without a default the column is added at once.
EMAIL = """
ALTER TABLE users ADD COLUMN email text;
"""

DROP = """
DROP FUNCTION IF EXISTS
    anynode_take_over_turns(text, uuid[], double precision, integer, integer, text[], double precision);
"""


class Migration(Migration):  # type: ignore[no-redef]
    """Adds `users.email`, and loads `anynode_take_over`."""

    dependencies = [("models", "0007_appended_questions")]  # noqa: RUF012
    operations = [  # noqa: RUF012
        RunSQL(EMAIL),
        load_functions("take_over"),
        RunSQL(DROP),
    ]
