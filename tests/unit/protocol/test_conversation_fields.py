"""The fields of a conversation that its owner sets, as the database takes them."""

from __future__ import annotations

from typing import Any

import pytest

from anynode.server.errors import InvalidFrame, MessageTooLarge
from anynode.server.protocol.bodies import ConversationChanges, NewConversation
from anynode.server.protocol.conversation_fields import METADATA_BYTES_MAX, METADATA_DEPTH_MAX, stored_fields


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def test_a_new_conversation_has_all_fields_and_changes_have_those_that_are_given() -> None:
    new = stored_fields(NewConversation(title="t", metadata={"a": 1}), system_prompt_bytes_max=10)
    assert (new["title"], new["system_prompt"], new["metadata"]) == ("t", None, '{"a":1}')
    assert stored_fields(ConversationChanges(title=None), system_prompt_bytes_max=10) == {"title": None}
    assert stored_fields(ConversationChanges(), system_prompt_bytes_max=10) == {}


def test_a_system_prompt_is_bounded_in_bytes() -> None:
    assert stored_fields(ConversationChanges(system_prompt="ö" * 5), system_prompt_bytes_max=10)
    with pytest.raises(MessageTooLarge, match="system_prompt is longer than 10 bytes"):
        stored_fields(ConversationChanges(system_prompt="ö" * 5 + "x"), system_prompt_bytes_max=10)


def test_metadata_is_bounded_as_postgres_stores_it() -> None:
    fits = {"a": "x" * (METADATA_BYTES_MAX - 8)}
    assert stored_fields(ConversationChanges(metadata=fits), system_prompt_bytes_max=10)
    for large in ({"a": "x" * (METADATA_BYTES_MAX - 7)}, {"a": [1e300] * 100}):
        with pytest.raises(MessageTooLarge, match="metadata is longer"):
            stored_fields(ConversationChanges(metadata=large), system_prompt_bytes_max=10)


def test_metadata_is_bounded_in_depth() -> None:
    assert stored_fields(ConversationChanges(metadata=nested(METADATA_DEPTH_MAX - 1)), system_prompt_bytes_max=10)
    with pytest.raises(InvalidFrame, match="metadata: is nested too deeply"):
        stored_fields(ConversationChanges(metadata=nested(METADATA_DEPTH_MAX + 1)), system_prompt_bytes_max=10)
