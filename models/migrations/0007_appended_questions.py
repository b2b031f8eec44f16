"""Appended questions: they can be answered where they are, and give their conversation a title."""

from tortoise.migrations.migration import Migration

from anynode.models.functions import load_functions


class Migration(Migration):  # type: ignore[no-redef]
    """Adds `anynode_answer`, which `anynode_regenerate` now calls, and gives titles in `anynode_append`."""

    dependencies = [("models", "0006_functions")]  # noqa: RUF012
    operations = [load_functions("answer", "append", "regenerate")]  # noqa: RUF012
