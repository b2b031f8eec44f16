"""What callers of a `Store` give it, checked as the HTTP API checks it. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeAlias
from uuid import UUID

import msgspec

from anynode.models.ids import as_uuid
from anynode.models.text import is_storable
from anynode.server.auth import USER_ID_CHARACTERS_MAX
from anynode.server.errors import InvalidFrame
from anynode.server.protocol.decoding import decode_body
from anynode.server.store.messages import message_to_dict

ConversationId: TypeAlias = UUID | str
"""The id of a conversation: ours, as a UUID or its text, or a text that the application has chosen."""

_POSTED = ("role", "content", "tool_calls", "tool_name", "tool_call_id")


def ids_of(conversation_id: ConversationId) -> tuple[str, UUID | None]:
    """Return an id as text, and as a UUID if it is one. Raises InvalidFrame for anything but a UUID or a text."""
    if isinstance(conversation_id, UUID):
        return str(conversation_id), conversation_id
    if not isinstance(conversation_id, str):
        raise InvalidFrame(f"conversation_id must be a UUID or a text, not {type(conversation_id).__name__}")
    return conversation_id, as_uuid(conversation_id)


def is_user_id(user_id: str) -> bool:
    """Return whether a user can have this id. Raises InvalidFrame for anything but a text."""
    if not isinstance(user_id, str):
        raise InvalidFrame(f"user_id must be a text, not {type(user_id).__name__}")
    return 1 <= len(user_id) <= USER_ID_CHARACTERS_MAX and is_storable(user_id)


def check_user_id(user_id: str) -> None:
    """Raise InvalidFrame unless a user can have this id."""
    if not is_user_id(user_id):
        raise InvalidFrame(f"user_id must be a text of 1 to {USER_ID_CHARACTERS_MAX} characters, without NUL")


def check_number(name: str, number: int, low: int, high: int) -> None:
    """Raise InvalidFrame unless `number` is a whole number from `low` to `high`."""
    if not isinstance(number, int) or isinstance(number, bool) or not low <= number <= high:
        raise InvalidFrame(f"{name} must be a whole number from {low} to {high}, not {number!r}")


def decoded(given: Mapping[str, Any], kind: type[Any]) -> Any:
    """Return arguments as the body of a request that has them. Raises InvalidFrame, which names each wrong one."""
    try:
        # msgspec's own JSON would store NaN and Infinity as null.
        text = json.dumps(msgspec.to_builtins(given, str_keys=True), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidFrame(f"what is given cannot be stored as JSON: {error}") from error
    return decode_body(text, [kind])


def posted(message: Any) -> dict[str, Any]:
    """Return a message to append, a mapping or a row of a store, as it is posted over HTTP: without empty fields, and
    of a row only what can be appended."""
    fields = message
    if not isinstance(message, Mapping):
        fields = {name: value for name, value in message_to_dict(message).items() if name in _POSTED}
    return {name: value for name, value in fields.items() if value is not None}
