"""The pure helpers for messages: the order of roles, the list that a model is asked with, and messages as JSON."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, Final
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anynode import HistoryMessage, RoleOrder, build_message_array, message_to_dict, validate_role_sequence
from anynode.models.rules import NEXT_ROLES
from anynode.server.store.messages import message_for_model

CALL: Final = {"id": "call-1", "type": "function", "function": {"name": "search", "arguments": "{}"}}
OTHER_CALL: Final = {**CALL, "id": "call-2"}
USER: Final = {"role": "user", "content": "hello"}
ANSWER: Final = {"role": "assistant", "content": "hi"}
CALLING: Final = {"role": "assistant", "content": "", "tool_calls": [CALL, OTHER_CALL]}
ROLES: Final = ("system", "user", "assistant", "tool")


def result(id: str) -> dict[str, Any]:
    return {"role": "tool", "content": "found", "tool_call_id": id}


# The order of roles.


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], {"system", "user"}),
        ([{"role": "system", "content": ""}], {"user"}),
        ([USER], {"assistant"}),
        ([USER, ANSWER], {"user"}),
        ([USER, CALLING], {"tool"}),
        ([USER, CALLING, result("call-2")], {"tool"}),
        ([USER, CALLING, result("call-2"), result("call-1")], {"assistant"}),
        ([USER, {**ANSWER, "tool_calls": []}], {"user"}),
        ([USER, {**ANSWER, "tool_calls": None}], {"user"}),
        ([USER, {**ANSWER, "status": "superseded"}], {"assistant"}),
        ([USER, {**CALLING, "status": "superseded"}, {**result("call-1"), "status": "superseded"}], {"assistant"}),
    ],
)
def test_the_roles_that_may_come_next_are_those_of_the_rules(messages: list[Any], expected: set[str]) -> None:
    for form in (messages, [SimpleNamespace(**message) for message in messages]):
        for role in ROLES:
            if role in expected:
                validate_role_sequence(form, role)
            else:
                with pytest.raises(RoleOrder) as refused:
                    validate_role_sequence(form, role)
                for other in expected:
                    assert other in refused.value.message.rpartition("expected: ")[2]


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([ANSWER], "^An assistant message cannot come first; expected: system or user.$"),
        ([USER, USER], "^A user message cannot follow a user message; expected: assistant.$"),
        ([USER, CALLING, result("call-3")], "^No call call-3 is pending; pending: call-1, call-2.$"),
        ([USER, {**CALLING, "tool_calls": [CALL, CALL]}], "^Two calls have the same id; give each its own.$"),
        ([USER, ANSWER, {"role": "robot", "content": ""}], "^A robot message cannot follow an assistant message"),
    ],
)
def test_messages_that_are_out_of_order_themselves_are_refused(messages: list[Any], words: str) -> None:
    with pytest.raises(RoleOrder, match=words):
        validate_role_sequence(messages, "user")


@given(st.lists(st.sampled_from([role for pair in NEXT_ROLES for role in NEXT_ROLES[pair]]), max_size=12))
def test_without_calls_the_order_is_that_of_a_small_machine(roles: list[str]) -> None:
    last: str | None = None
    for number, role in enumerate(roles):
        before = [{"role": each, "content": "x"} for each in roles[:number]]
        follows = {None: {"system", "user"}, "system": {"user"}, "user": {"assistant"}, "assistant": {"user"}}[last]
        if role not in follows:
            with pytest.raises(RoleOrder):
                validate_role_sequence(before, role)
            return
        validate_role_sequence(before, role)
        last = role


# What a model is asked with.


def test_the_list_for_a_model_is_the_prompt_the_messages_and_the_question() -> None:
    messages = [USER, CALLING, result("call-1"), result("call-2"), ANSWER]
    asked = build_message_array(messages, "And now?", "Be kind.")
    assert asked == [{"role": "system", "content": "Be kind."}, *messages, {"role": "user", "content": "And now?"}]
    assert build_message_array([], "And now?") == [{"role": "user", "content": "And now?"}]
    assert json.loads(json.dumps(asked)) == asked


def test_rows_mappings_and_messages_of_an_agent_make_the_same_list() -> None:
    history = [
        HistoryMessage("user", "hello"),
        HistoryMessage("assistant", "", [CALL]),
        HistoryMessage("tool", "found", None, "search", "call-1"),
    ]
    names = ("role", "content", "tool_calls", "tool_name", "tool_call_id")
    mappings = [{name: getattr(message, name) for name in names} for message in history]
    rows = [SimpleNamespace(**fields, status="completed", id=UUID(int=1)) for fields in mappings]
    lists = [build_message_array(messages, "And now?") for messages in (history, mappings, rows)]
    assert lists[0] == lists[1] == lists[2]
    assert lists[0][1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert lists[0][2] == {"role": "tool", "content": "found", "tool_call_id": "call-1"}


def test_superseded_messages_are_left_out_of_the_list() -> None:
    shown = build_message_array([USER, {**ANSWER, "status": "superseded"}, {**ANSWER, "status": "failed"}], "Again?")
    assert [message["content"] for message in shown] == ["hello", "hi", "Again?"]


@pytest.mark.parametrize("leading", [0, 1, 2])
@pytest.mark.parametrize("prompt", [None, "", "Be kind."])
def test_a_prompt_takes_the_place_of_system_messages_at_the_beginning(leading: int, prompt: str | None) -> None:
    messages = [{"role": "system", "content": "old"}] * leading + [USER]
    shown = build_message_array(messages, "And now?", prompt)
    before = [{"role": "system", "content": "old"}] * leading
    expected = before if prompt is None else [{"role": "system", "content": prompt}]
    assert shown == [*expected, USER, {"role": "user", "content": "And now?"}]


def test_the_list_shares_nothing_that_the_caller_could_change_by_it() -> None:
    messages = [dict(USER)]
    build_message_array(messages, "x", "y")[1]["content"] = "changed"
    assert messages == [USER]


@given(
    st.lists(
        st.builds(
            lambda role, content, status: {"role": role, "content": content, "status": status},
            st.sampled_from(ROLES),
            st.text(max_size=5),
            st.sampled_from(["completed", "superseded", "failed", "cancelled"]),
        ),
        max_size=8,
    ),
    st.none() | st.text(max_size=5),
)
def test_every_message_that_stands_is_in_the_list_once_and_in_order(
    messages: list[dict[str, str]], prompt: str | None
) -> None:
    shown = build_message_array(messages, "question", prompt)
    standing = [(each["role"], each["content"]) for each in messages if each["status"] != "superseded"]
    if prompt is not None:
        while standing and standing[0][0] == "system":
            del standing[0]
        standing.insert(0, ("system", prompt))
    assert [(each["role"], each["content"]) for each in shown] == [*standing, ("user", "question")]
    assert all(each.keys() == {"role", "content"} for each in shown)


# Messages as JSON.


def test_a_message_as_json_has_all_fields_with_its_ids_as_text_and_its_time_in_iso_8601() -> None:
    id, turn_id = UUID(int=1), UUID(int=2)
    row = SimpleNamespace(
        id=id,
        role="tool",
        content="found",
        tool_calls=None,
        tool_name="search",
        tool_call_id="call-1",
        status="completed",
        turn_id=turn_id,
        created_at=datetime(2026, 1, 2, 3, 4, 5, 600, UTC),
        position=3,
        user_id="ada",
    )
    assert message_to_dict(row) == {
        "id": str(id),
        "role": "tool",
        "content": "found",
        "tool_calls": None,
        "tool_name": "search",
        "tool_call_id": "call-1",
        "status": "completed",
        "turn_id": str(turn_id),
        "created_at": "2026-01-02T03:04:05.000600+00:00",
    }
    assert json.loads(json.dumps(message_to_dict(row))) == message_to_dict(row)


@pytest.mark.parametrize("message", [{}, SimpleNamespace(), HistoryMessage("user", "hello"), USER])
def test_fields_that_a_message_does_not_have_are_none(message: Any) -> None:
    shown = message_to_dict(message)
    missing = {"id", "tool_calls", "tool_name", "tool_call_id", "status", "turn_id", "created_at"}
    assert {name for name in missing if shown[name] is None} == missing


def test_a_message_as_json_can_be_made_again_from_itself() -> None:
    shown = message_to_dict({**USER, "id": UUID(int=1), "created_at": datetime(2026, 1, 1, tzinfo=UTC)})
    assert message_to_dict(shown) == shown


def test_what_a_model_is_told_leaves_out_what_is_empty_and_the_tools_name() -> None:
    told = message_for_model(HistoryMessage("tool", "", None, "search", "call-1"))
    assert told == {"role": "tool", "content": "", "tool_call_id": "call-1"}
