"""A conversation's messages in the form of the chat completions API, so that a history can move in and out. Pure."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET

from anynode.models.rules import kept
from anynode.server.engine.conversations import Page
from anynode.server.protocol.bodies import Export, ExportedMessage
from anynode.server.protocol.encoding import tool_calls_of


def exported(page: Page) -> Export:
    """Return a page as an agent would see it, without superseded answers and turns that failed before they spoke.

    On the first page the conversation's system prompt comes first.
    """
    # Whether a question stands is known from what answers it, and whether an empty end does from what is before it: the
    # messages next to the page count, but are not in it.
    beside = [row["id"] for row in (page.older, page.newer) if row is not None]
    rows = [row for row in (page.older, *page.messages, page.newer) if row is not None]
    seen = kept([_Row(row) for row in rows])
    messages = [_message(each) for each in seen if each.row["id"] not in beside]
    if page.is_first and page.system_prompt and (not messages or messages[0].role != "system"):
        messages.insert(0, ExportedMessage("system", page.system_prompt))
    return Export(messages)


class _Row:
    """A row whose columns are attributes, as `models.rules` takes it."""

    __slots__ = ("content", "role", "row", "status", "turn_id")

    def __init__(self, row: Any) -> None:
        self.row = row
        self.role: str = row["role"]
        self.content: str = row["content"]
        self.status: str = row["status"]
        self.turn_id: object = row["turn_id"]


def _message(row: _Row) -> ExportedMessage:
    calls = tool_calls_of(row.row["tool_calls"])
    return ExportedMessage(
        row.role,
        None if calls and not row.content else row.content,
        calls or UNSET,
        row.row["tool_call_id"] or UNSET,
    )
