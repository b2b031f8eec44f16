"""Messages as plain values, for models and for people: which role may come next, and the list that a model is given.

Pure: nothing here reads a database. A message is a row of the store (`Message`), a `HistoryMessage` of an agent, or a
mapping with the same fields, such as a message of the chat completions API.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from anynode.models.rules import SUPERSEDED, OutOfOrder, Tail
from anynode.server.agents.agent import HistoryMessage
from anynode.server.agents.run_agent import chat_message
from anynode.server.errors import RoleOrder

_FIELDS: Final = ("id", "role", "content", "tool_calls", "tool_name", "tool_call_id", "status", "turn_id", "created_at")


def validate_role_sequence(messages: Sequence[Any], new_role: str) -> None:
    """Check that a message of `new_role` may come after `messages` (oldest first), by the rules that the store applies.

    The first message is a system's or a user's; a user's is answered by an assistant's; an assistant's with calls is
    followed by one tool's message for each call, and those by an assistant's. Superseded messages do not count. Raises
    RoleOrder, whose message says which roles are expected.
    """
    tail = Tail()
    try:
        for message in messages:
            if _field(message, "status") != SUPERSEDED:
                tail = tail.followed_by(
                    str(_field(message, "role")),
                    calls=[(call["id"], call["function"]["name"]) for call in _field(message, "tool_calls") or ()],
                    tool_call_id=_field(message, "tool_call_id"),
                )
        tail.check(new_role)
    except OutOfOrder as error:
        raise RoleOrder(str(error)) from error


def build_message_array(
    messages: Sequence[Any], user_message: str, system_prompt: str | None = None
) -> list[dict[str, Any]]:
    """Return the list of messages that a model is asked with: the system prompt, `messages`, and the user's message.

    Each is a dict with `role` and `content`, and with `tool_calls` or `tool_call_id` where it has them, as in the chat
    completions API. Superseded messages are left out. A `system_prompt` takes the place of a system message at the
    beginning of `messages`.
    """
    shown = [message_for_model(message) for message in messages if _field(message, "status") != SUPERSEDED]
    if system_prompt is not None:
        while shown and shown[0]["role"] == "system":
            del shown[0]
        shown.insert(0, {"role": "system", "content": system_prompt})
    return [*shown, {"role": "user", "content": user_message}]


def message_to_dict(message: Any) -> dict[str, Any]:
    """Return all fields of a message as JSON has them: ids as text, the time in ISO 8601. Fields that the message does
    not have are None."""
    fields = {name: _field(message, name) for name in _FIELDS}
    for name in ("id", "turn_id"):
        fields[name] = None if fields[name] is None else str(fields[name])
    created_at = fields["created_at"]
    fields["created_at"] = created_at.isoformat() if hasattr(created_at, "isoformat") else created_at
    return fields


def message_for_model(message: Any) -> dict[str, Any]:
    """Return the fields of a message that a model is told, as the chat completions API has them."""
    fields = {name: _field(message, name) for name in ("role", "content", "tool_calls", "tool_call_id")}
    return chat_message(HistoryMessage(**fields))


def _field(message: Any, name: str) -> Any:
    return message.get(name) if isinstance(message, Mapping) else getattr(message, name, None)
