"""Stored messages as the AI SDK shows them, which makes one message of all that answers a question. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any
from uuid import UUID

import asyncpg
from msgspec import UNSET

from anynode.models.rules import COMPLETED, FAILED
from anynode.server.api.ai_sdk.bodies import ShownMessage
from anynode.server.api.ai_sdk.fold import arguments_of, metadata_of
from anynode.server.engine.conversations import Page
from anynode.server.protocol.encoding import tool_calls_of, usage_of


def shown_messages(page: Page, usages: Mapping[UUID, str]) -> tuple[list[ShownMessage], UUID | None]:
    """Return the messages of a page, and the id before which older ones come (None: there are none).

    `usages` are JSON, by the ids of turns. An answer of which the page only holds the end is left to the next page,
    unless the page holds nothing else.
    """
    groups = [list(rows) for _, rows in groupby(page.messages, _group)]
    if page.older is not None and len(groups) > 1 and _group(page.older) == _group(groups[0][0]):
        del groups[0]
    messages = [_shown(rows, usages) for rows in groups]
    return messages, None if page.is_first else groups[0][0]["id"]


def _group(row: asyncpg.Record) -> tuple[bool, UUID]:
    """Return a key that is the same for messages that are shown as one."""
    is_answer = row["role"] in ("assistant", "tool")
    return is_answer, row["turn_id"] if is_answer and row["turn_id"] is not None else row["id"]


def _shown(rows: Sequence[asyncpg.Record], usages: Mapping[UUID, str]) -> ShownMessage:
    first, last = rows[0], rows[-1]
    if first["role"] in ("user", "system"):
        id = first["client_id"] or str(first["id"])
        return ShownMessage(id, first["role"], [{"type": "text", "text": first["content"]}])
    results = {row["tool_call_id"]: row for row in rows if row["role"] == "tool"}
    parts = [part for row in rows if row["role"] == "assistant" for part in _step(row, results)]
    usage = usages.get(last["turn_id"])
    metadata = metadata_of(usage_of(usage))
    if last["status"] != COMPLETED:
        metadata["status"] = last["status"]
    return ShownMessage(str(first["turn_id"] or first["id"]), "assistant", parts, metadata or UNSET)


def _step(row: asyncpg.Record, results: Mapping[str, asyncpg.Record]) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "step-start"}]
    if row["content"]:
        parts.append({"type": "text", "text": row["content"], "state": "done"})
    for call in tool_calls_of(row["tool_calls"]) or ():
        part = {
            "type": "dynamic-tool",
            "toolName": call["function"]["name"],
            "toolCallId": call["id"],
            "state": "input-available",
            "input": arguments_of(call),
            "providerExecuted": True,
        }
        result = results.get(call["id"])
        if result is not None and result["status"] == FAILED:
            part |= {"state": "output-error", "errorText": result["content"]}
        elif result is not None:
            part |= {"state": "output-available", "output": result["content"]}
        parts.append(part)
    return parts
