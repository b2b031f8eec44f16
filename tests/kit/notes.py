"""A table of an application that uses Tortoise for itself, in a database of its own."""

from __future__ import annotations

from tortoise import fields
from tortoise.models import Model


class Note(Model):
    """A note."""

    id = fields.IntField(primary_key=True)
    text = fields.TextField()

    class Meta:
        table = "notes"
