"""The parts of an open `Store`."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from anynode.models.database import Database
from anynode.server.engine.node import Node
from anynode.server.store.chats import Chats

if TYPE_CHECKING:
    from anynode.server.store.rows import Rows


class Parts:
    """A database, a node without an agent that writes to it, the turns of that node, and the rows that are read."""

    def __init__(self, database: Database, node: Node) -> None:
        self.database = database
        self.node = node
        self.chats = Chats(node)

    @cached_property
    def rows(self) -> Rows:
        from anynode.server.store.rows import Rows  # loads Tortoise, without which a node starts in half the time

        return Rows(self.database)
