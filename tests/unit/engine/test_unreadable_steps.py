"""What cannot be read of a turn is not taken for a step, whichever field of whichever event it is."""

from __future__ import annotations

import json
from typing import Any

import pytest

from anynode.server.engine.steps import steps_in

CALL = ("turn.tool_call", {"tool_call_id": "1", "tool_name": "tool", "arguments": {}})
RESULT = ("turn.tool_result", {"tool_call_id": "1", "tool_name": "tool", "content": "found", "is_error": False})
GOOD: list[tuple[str, dict[str, Any]]] = [("turn.delta", {"text": "said "}), CALL, RESULT]


def journal(type: str, **fields: Any) -> list[tuple[str, str]]:
    """That of a completed step, with other fields (None: without them) in its event of this type."""
    changed = [(event, {**payload, **(fields if event == type else {})}) for event, payload in GOOD]
    return [
        (event, json.dumps({name: value for name, value in payload.items() if value is not None}))
        for event, payload in changed
    ]


def test_a_journal_that_nobody_has_changed_is_read() -> None:
    ((step,), partial, _) = steps_in(journal("turn.delta"))
    assert (step.text, [call.tool_call_id for call in step.calls], partial) == ("said ", ["1"], "")


@pytest.mark.parametrize(
    ("type", "field", "value"),
    [
        ("turn.tool_result", "tool_call_id", 7),
        ("turn.tool_result", "tool_call_id", None),
        ("turn.tool_result", "tool_name", 7),
        ("turn.tool_result", "content", ["found"]),
        ("turn.tool_result", "is_error", "no"),
        ("turn.tool_call", "tool_call_id", None),
        ("turn.tool_call", "arguments", None),
        ("turn.delta", "text", None),
        ("turn.tool_call", "tool_call_id", 7),
        ("turn.tool_call", "tool_name", 7),
        ("turn.tool_call", "arguments", "none"),
        ("turn.delta", "text", 7),
    ],
)
def test_a_journal_with_a_field_of_the_wrong_kind_cannot_be_read(type: str, field: str, value: Any) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011 (whatever it is, its turn fails)
        steps_in(journal(type, **{field: value}))


@pytest.mark.parametrize("before", [[], GOOD], ids=["at once", "after another one"])
def test_a_journal_with_a_result_of_a_call_that_was_never_made_cannot_be_read(
    before: list[tuple[str, dict[str, Any]]],
) -> None:
    orphan = (RESULT[0], {**RESULT[1], "tool_call_id": "2"})
    with pytest.raises(Exception):  # noqa: B017, PT011
        steps_in([(type, json.dumps(payload)) for type, payload in [*before, orphan]])
