"""Appended questions: they can be answered where they are, and give their conversation a title.

The functions that this migration loaded have other names since 0009, which loads them.
"""

from tortoise.migrations.migration import Migration


class Migration(Migration):  # type: ignore[no-redef]
    """Does nothing any more."""

    dependencies = [("models", "0006_functions")]  # noqa: RUF012
    operations = []  # noqa: RUF012
