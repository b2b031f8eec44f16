"""Bodies and queries are decoded strictly: what is right comes out whole, and everything that is wrong is named."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import pytest
from msgspec import UNSET

from anynode.server.api.operations import OPERATIONS
from anynode.server.errors import InvalidFrame
from anynode.server.protocol.bodies import (
    MESSAGES_AT_ONCE_MAX,
    AnyPostedMessage,
    AssistantMessage,
    Body,
    Cancel,
    Chat,
    Continue,
    ConversationChanges,
    ConversationsQuery,
    EventsQuery,
    MessagesQuery,
    NewCall,
    NewCalledFunction,
    NewConversation,
    NewMessages,
    Regenerate,
    SystemMessage,
    TextPart,
    ToolMessage,
    UserMessage,
)
from anynode.server.protocol.decoding import PROBLEMS_MAX, decode_body, decode_query

ID = "0199aa10-5f3e-7c51-9b1d-2f5b6f0a7c11"
APPENDED: Final[Sequence[Any]] = (NewMessages, AnyPostedMessage)
KINDS: Final = [operation.bodies for operation in OPERATIONS if operation.bodies]


def decoded(body: Any, *kinds: Any) -> Any:
    return decode_body(json.dumps(body).encode(), kinds)


def problems(body: Any, *kinds: Any) -> dict[str, str]:
    """What is wrong, by its path; none is named twice."""
    with pytest.raises(InvalidFrame) as raised:
        decoded(body, *kinds)
    found = dict(raised.value.problems)
    assert len(found) == len(raised.value.problems)
    assert all(found.values())
    return found


def refusal(data: bytes, *kinds: Any) -> str:
    with pytest.raises(InvalidFrame) as raised:
        decode_body(data, kinds or (NewConversation,))
    assert not raised.value.problems
    return raised.value.message


# What is right.


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, NewConversation()),
        ({"title": None, "system_prompt": None}, NewConversation()),
        ({"title": "x" * 200}, NewConversation("x" * 200)),
        ({"metadata": {"": [1.5, None, {"a": True}]}}, NewConversation(metadata={"": [1.5, None, {"a": True}]})),
        ({"title": "\U0001f600 \ud83d\ude00"}, NewConversation("\U0001f600 \U0001f600")),
    ],
)
def test_a_new_conversation(body: Any, expected: NewConversation) -> None:
    assert decoded(body, NewConversation) == expected


def test_nothing_is_an_empty_object() -> None:
    for kind in (NewConversation, ConversationChanges, Cancel, Regenerate):
        assert decode_body(b"", (kind,)) == kind()


def test_what_is_absent_is_not_null() -> None:
    assert decoded({}, ConversationChanges).title is UNSET
    assert decoded({"title": None}, ConversationChanges).title is None


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"role": "system", "content": "x"}, SystemMessage("x")),
        ({"role": "user", "content": " x "}, UserMessage(" x ")),
        ({"role": "user", "content": [{"type": "text", "text": "x"}]}, UserMessage([TextPart("x")])),
        ({"role": "assistant"}, AssistantMessage()),
        ({"role": "assistant", "content": ""}, AssistantMessage("")),
        ({"role": "assistant", "content": None, "tool_calls": None}, AssistantMessage()),
        (
            {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": ""}}]},
            AssistantMessage(None, [NewCall("1", NewCalledFunction("f", ""))]),
        ),
        ({"role": "tool", "tool_call_id": "1", "content": ""}, ToolMessage("1", "")),
    ],
)
def test_a_message_alone_and_in_a_list(body: Any, expected: Any) -> None:
    assert decoded(body, *APPENDED) == expected
    assert decoded({"messages": [body, body]}, *APPENDED) == NewMessages([expected, expected])


def test_the_kind_is_the_one_whose_fields_are_there() -> None:
    assert set(problems({"messages": [], "role": "user", "content": "x"}, *APPENDED)) == {"content", "messages", "role"}
    assert set(problems({"nonsense": 1, "content": "x", "role": "user"}, *APPENDED)) == {"nonsense"}


# What is wrong.


@pytest.mark.parametrize(
    ("kind", "body", "paths"),
    [
        (NewConversation, {"title": 1, "system_prompt": 2, "metadata": 3}, ["metadata", "system_prompt", "title"]),
        (NewConversation, {"title": "", "a": 1, "b": 2}, ["a", "b", "title"]),
        (NewConversation, {"metadata": None}, ["metadata"]),
        (ConversationChanges, {"metadata": None, "title": "x" * 201}, ["metadata", "title"]),
        (Continue, {"content": ""}, ["content"]),
        (Continue, {"content": "\u2003\ufeff\x1c\x85"}, ["content"]),
        (Continue, {"content": None, "wait": 1, "if_busy": None}, ["if_busy", "wait"]),
        (Continue, {"content": "x", "message_id": "a\u200bb"}, ["message_id"]),
        (Continue, {"content": " ", "message_id": "a\tb"}, ["content", "message_id"]),
        (Continue, {"content": "x", "message_id": "x" * 129}, ["message_id"]),
        (Chat, {"conversation_id": "x", "message_id": 1}, ["conversation_id", "message", "message_id"]),
        (Chat, {"message": "x", "conversation_id": ID[:-1]}, ["conversation_id"]),
        (Cancel, {"turn_id": 1}, ["turn_id"]),
        (Regenerate, {"wait": "true", "message_id": []}, ["message_id", "wait"]),
    ],
)
def test_every_problem_is_named(kind: type[Body], body: Any, paths: list[str]) -> None:
    assert sorted(problems(body, kind)) == paths


MESSAGES: Final = [
    ({"role": "user"}, {"content"}),
    ({"role": "user", "content": None}, {"content"}),
    ({"role": "user", "content": "\n"}, {"content"}),
    ({"role": "user", "content": []}, {"content"}),
    ({"role": "user", "content": {}}, {"content"}),
    ({"role": "user", "content": ["x", {"text": 1}, {"type": "image_url", "text": "x"}]}, None),
    ({"role": "user", "content": [{"text": "x", "type": "text", "cache": 1}]}, {"content[0].cache"}),
    ({"role": "user", "content": "x", "tool_calls": [], "name": 1}, {"tool_calls", "name"}),
    ({"role": "system", "content": 1, "x": 1}, {"content", "x"}),
    ({"role": "assistant", "content": 1, "tool_calls": {}}, {"content", "tool_calls"}),
    ({"role": "assistant", "tool_calls": [1, {}]}, None),
    (
        {"role": "assistant", "tool_calls": [{"id": "a\n", "function": {"name": "f", "arguments": ""}}]},
        {"tool_calls[0].id"},
    ),
    (
        {
            "role": "assistant",
            "tool_calls": [{"id": "", "type": "f", "function": {"name": "", "arguments": {}, "x": 1}}],
        },
        {
            *("tool_calls[0].id", "tool_calls[0].type", "tool_calls[0].function.name"),
            *("tool_calls[0].function.arguments", "tool_calls[0].function.x"),
        },
    ),
    ({"role": "tool", "content": "x", "tool_call_id": ""}, {"tool_call_id"}),
    ({"role": "tool", "tool_name": ""}, {"content", "tool_call_id", "tool_name"}),
    ({"role": "tool", "content": "x", "tool_call_id": "\x7f"}, {"tool_call_id"}),
]
PARTS_AND_CALLS: Final = {
    5: {"content[0]", "content[1].text", "content[2].type"},
    10: {"tool_calls[0]", "tool_calls[1].id", "tool_calls[1].function"},
}


@pytest.mark.parametrize("number", range(len(MESSAGES)))
def test_every_problem_of_a_message_is_named_with_its_place(number: int) -> None:
    body, paths = MESSAGES[number]
    paths = paths or PARTS_AND_CALLS[number]
    assert set(problems(body, *APPENDED)) == paths
    fine = {"role": "user", "content": "x"}
    assert set(problems({"messages": [fine, body, fine]}, *APPENDED)) == {f"messages[1].{path}" for path in paths}


@pytest.mark.parametrize("role", ["robot", "", 1, None, [], {"user": 1}, "User"])
def test_a_role_that_is_none_is_named(role: Any) -> None:
    assert set(problems({"role": role, "content": "x"}, *APPENDED)) == {"role"}


def test_a_role_that_is_none_is_named_in_a_list() -> None:
    body = {"messages": [{"role": "robot"}, {"role": 1}, {"role": "user", "content": "x"}]}
    assert set(problems(body, *APPENDED)) == {"messages[0].role", "messages[1].role"}


def test_a_missing_role_is_named_like_other_missing_fields() -> None:
    assert set(problems({"messages": [{"content": "x"}]}, *APPENDED)) == {"messages[0].role"}


@pytest.mark.parametrize(
    "messages", [[], {}, None, "x", [{"role": "user", "content": "x"}] * (MESSAGES_AT_ONCE_MAX + 1)]
)
def test_a_list_that_is_none_or_too_long_is_named(messages: Any) -> None:
    assert set(problems({"messages": messages}, *APPENDED)) == {"messages"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"role": "user", "content": " "},
        {"role": "user", "content": [{"text": " "}]},
        {"role": "user", "content": 1},
        "x",
    ],
)
def test_of_many_problems_the_first_are_told(wrong: Any) -> None:
    found = problems({"messages": [wrong] * 1000}, *APPENDED)
    assert len(found) == PROBLEMS_MAX
    assert all(path.startswith(f"messages[{number}]") for number, path in enumerate(found))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\xff{}", "UTF-8"),
        (b'{"title": "\xed\xa0\xbd"}', "UTF-8"),
        (b"[]", "object"),
        (b"null", "object"),
        (b'"x"', "object"),
        (b"1", "object"),
        (b"{", "JSON"),
        (b"\xef\xbb\xbf{}", "JSON"),
        (b'{"metadata": {"a": NaN}}', "NaN"),
        (b'{"metadata": {"a": -Infinity}}', "Infinity"),
        (b'{"metadata": {"a": 1e999}}', "too large"),
        (b'{"a": 1, "a": 2}', "duplicate key"),
        (b'{"metadata": {"a": 1, "\\u0061": 2}}', "duplicate key"),
        (b'{"title": "\\u0000"}', "NUL"),
        (b'{"metadata": [[{"\\ud800": 1}]]}', "surrogate"),
        (b'{"metadata": {"a": ["\\ud800"]}}', "surrogate"),
        (b'{"metadata": {"a": ' + b"[" * 50_000 + b"]" * 50_000 + b"}}", "deep"),
        (b'{"metadata": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001, "deep"),
        (b"[" * 50_000 + b"]" * 50_000, "deep"),
    ],
)
def test_what_is_not_a_strict_json_object_is_refused_with_its_reason(data: bytes, said: str) -> None:
    assert said in refusal(data)


# Long bodies.


LONG: Final = "x" * 300_000


def test_a_long_body_is_decoded_as_a_short_one() -> None:
    parts = [{"type": "text", "text": LONG}, {"type": "text", "text": "y"}]
    message = {"role": "user", "content": parts}
    expected = UserMessage([TextPart(LONG), TextPart("y")])
    assert decoded(message, *APPENDED) == expected
    assert decoded({"messages": [message]}, *APPENDED) == NewMessages([expected])
    assert decoded({"metadata": {"a": [LONG, 1e20, 10**30]}}, NewConversation).metadata == {"a": [LONG, 1e20, 10**30]}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"messages": ["x"] * 100_000}, {"messages[0]": "Expected `object`, got `str`"}),
        ({"messages": [{"role": "user", "content": 1}] * 9, "x": LONG}, {"messages[0].content": "Expected"}),
        ({"role": "user", "content": LONG, "more": 1}, {"": "Object contains unknown field `more`"}),
        ([LONG], {"": "Expected `object`, got `array`"}),
    ],
)
def test_the_first_fault_of_a_long_body_is_named(body: Any, expected: dict[str, str]) -> None:
    found = problems(body, *APPENDED)
    assert found.keys() == expected.keys()
    assert all(found[path].startswith(said) for path, said in expected.items())


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (f'{{"title": null, "metadata": {{"a": "{LONG}"}}, "title": null}}', "duplicate key"),
        (f'{{"metadata": {{"a": "{LONG}\\u0000"}}}}', "NUL"),
        (f'{{"metadata": {{"a": "{LONG}\\ud800"}}}}', "not JSON"),
        (f'{{"metadata": {{"a": "{LONG}"}}', "not JSON"),
        (f'{{"metadata": {{"a": "{LONG}", "b": NaN}}}}', "not JSON"),
        (f'{{"metadata": {{"a": {"[" * 200_000}{"]" * 200_000}}}}}', "deep"),
    ],
)
def test_a_long_body_is_decoded_strictly(body: str, said: str) -> None:
    assert said in refusal(body.encode())


# Queries.


def test_a_query_is_read_from_its_texts() -> None:
    assert decode_query([], ConversationsQuery) == ConversationsQuery()
    assert decode_query([("limit", "5"), ("skip", "0")], ConversationsQuery) == ConversationsQuery(5, 0)
    assert decode_query([("before", ID), ("format", "openai")], MessagesQuery) == MessagesQuery(
        UNSET, UUID(ID), "openai"
    )
    assert decode_query([("after", "9223372036854775807")], EventsQuery) == EventsQuery(2**63 - 1)


@pytest.mark.parametrize(
    ("kind", "parameters", "paths"),
    [
        (ConversationsQuery, [("limit", "0"), ("skip", "-1"), ("x", "")], ["query.limit", "query.skip", "query.x"]),
        (ConversationsQuery, [("limit", "101")], ["query.limit"]),
        (ConversationsQuery, [("limit", "")], ["query.limit"]),
        (ConversationsQuery, [("limit", "1"), ("limit", "1")], ["query"]),
        (MessagesQuery, [("before", "x"), ("format", "xml"), ("limit", "1001")], None),
        (EventsQuery, [("after", "9223372036854775808")], ["query.after"]),
        (EventsQuery, [("after", "-1"), ("limit", "1")], ["query.after", "query.limit"]),
        (EventsQuery, [("after", "1.0")], ["query.after"]),
        (EventsQuery, [("after", "1e3")], ["query.after"]),
        (EventsQuery, [("after", "+1")], ["query.after"]),
        (EventsQuery, [("after", " 1")], ["query.after"]),
        (ConversationsQuery, [("limit", "1e1"), ("skip", "x"), ("y", "1")], ["query.limit", "query.skip", "query.y"]),
    ],
)
def test_every_problem_of_a_query_is_named(
    kind: type[Body], parameters: list[tuple[str, str]], paths: list[str] | None
) -> None:
    with pytest.raises(InvalidFrame) as raised:
        decode_query(parameters, kind)
    assert sorted(problem.path for problem in raised.value.problems) == (
        paths or ["query.before", "query.format", "query.limit"]
    )


# The process lives. A guard: with a `pattern` in a union msgspec 0.22 freed what it still used.

ATOMS: Final = ["", " ", "x", "x" * 300, "\n", "\x7f", "\u2003", ID, 0, -1, 1.5, 2**70, True, None, [], {}, [[]], [{}]]
FIELDS: Final = (
    *("role", "content", "tool_calls", "tool_call_id", "tool_name", "messages", "title", "system_prompt", "metadata"),
    *("message", "message_id", "conversation_id", "turn_id", "if_busy", "wait", "id", "function", "name", "arguments"),
    *("type", "text", "unknown"),
)
ROLES: Final = ("system", "user", "assistant", "tool", "robot", 1, None)


def anything(dice: random.Random, depth: int) -> Any:
    """A value that is mostly wrong, and looks like what is right."""
    match dice.randrange(7) if depth else 0:
        case 1 | 2 | 3:
            fields = dice.sample(FIELDS, dice.randrange(1, 6))
            value = {name: anything(dice, depth - 1) for name in fields}
            if dice.random() < 0.7:
                value["role"] = dice.choice(ROLES)
            return value
        case 4 | 5:
            return [anything(dice, depth - 1) for _ in range(dice.randrange(4))]
        case _:
            return dice.choice(ATOMS)


def decode_much(seed: int, count: int) -> tuple[int, int]:
    """Decode that many bodies as each operation does; returns how many were taken and refused. Whatever else happens
    is raised."""
    dice = random.Random(seed)
    taken = refused = 0
    for _ in range(count):
        value = anything(dice, 4)
        data = json.dumps(value if isinstance(value, dict) else {"messages": value}).encode()
        if dice.random() < 0.05:
            data = data[: dice.randrange(len(data) + 1)]
        for kinds in KINDS:
            try:
                decode_body(data, kinds)
                taken += 1
            except InvalidFrame:
                refused += 1
    return taken, refused


@pytest.mark.slow
def test_no_body_ends_the_process() -> None:
    finished = subprocess.run(
        [sys.executable, "-X", "dev", "-m", "tests.unit.protocol.test_decoding"],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    taken, refused = map(int, finished.stdout.split())
    assert taken > 100
    assert refused > 10_000


if __name__ == "__main__":
    print(*decode_much(seed=1, count=2500))
