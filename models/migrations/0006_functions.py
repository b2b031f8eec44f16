"""Functions from files: the current body of each is in `models/functions/`, and migrations load it from there.

`anynode_take_over` is dropped. Only a version between two releases called it: 0.1.0 takes turns over by a statement of
its own, so no released node needs it.
"""

from tortoise.migrations.migration import Migration
from tortoise.migrations.operations import RunSQL

from anynode.models.functions import load_functions

DROP = """
DROP FUNCTION anynode_take_over(text, uuid[], double precision, integer, integer, boolean, double precision);
"""


class Migration(Migration):  # type: ignore[no-redef]
    """Loads every function."""

    dependencies = [("models", "0005_chats")]  # noqa: RUF012
    operations = [  # noqa: RUF012
        load_functions("admit", "chat", "delete", "history"),
        RunSQL(DROP),
    ]
