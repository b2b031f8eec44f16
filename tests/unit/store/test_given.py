"""What callers of a `Store` give it: ids, users, numbers, and messages in the forms that they come in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anynode import InvalidFrame, message_to_dict
from anynode.server.protocol.bodies import NewConversation, NewMessages, UserMessage
from anynode.server.store.given import check_number, check_user_id, decoded, ids_of, is_user_id, posted

ID = UUID("0199aa10-5f3e-7c51-9b1d-2f5b6f0a7c12")


@pytest.mark.parametrize(
    ("given", "ids"),
    [
        (ID, (str(ID), ID)),
        (str(ID), (str(ID), ID)),
        (str(ID).upper(), (str(ID).upper(), ID)),
        (ID.hex, (ID.hex, None)),
        (f"{{{ID}}}", (f"{{{ID}}}", None)),
        (ID.urn, (ID.urn, None)),
        ("", ("", None)),
        ("chat 1/ö", ("chat 1/ö", None)),
        ("-" * 36, ("-" * 36, None)),
        ("ö" * 36, ("ö" * 36, None)),
    ],
)
def test_an_id_is_a_uuid_or_its_text_or_the_applications_own(given: UUID | str, ids: tuple[str, UUID | None]) -> None:
    assert ids_of(given) == ids


@pytest.mark.parametrize("given", [None, 1, b"x", ID.bytes, [ID], object])
def test_what_is_neither_a_uuid_nor_a_text_is_no_id(given: Any) -> None:
    with pytest.raises(InvalidFrame, match=r"^conversation_id must be a UUID or a text, not \w+$"):
        ids_of(given)


@pytest.mark.parametrize("user", ["a", "x" * 255, "ö" * 255, "\U0001f600", "a b", "\n"])
def test_a_user_is_any_text_of_1_to_255_characters(user: str) -> None:
    assert is_user_id(user)
    check_user_id(user)


@pytest.mark.parametrize("user", ["", "x" * 256, "a\0", "\ud800"])
def test_a_text_that_postgres_cannot_hold_or_that_is_too_long_is_no_user(user: str) -> None:
    assert not is_user_id(user)
    with pytest.raises(InvalidFrame, match=r"^user_id must be a text of 1 to 255 characters, without NUL$"):
        check_user_id(user)


@pytest.mark.parametrize("user", [None, 1, b"ada", ["ada"]])
def test_a_user_is_a_text(user: Any) -> None:
    with pytest.raises(InvalidFrame, match=r"^user_id must be a text, not \w+$"):
        is_user_id(user)


@given(st.integers(), st.integers(), st.integers())
def test_a_number_is_within_its_bounds_or_refused_with_them(number: int, low: int, high: int) -> None:
    if low <= number <= high:
        check_number("limit", number, low, high)
    else:
        with pytest.raises(InvalidFrame, match=f"^limit must be a whole number from {low} to {high}, not {number}$"):
            check_number("limit", number, low, high)


@pytest.mark.parametrize("number", [True, 1.0, "1", None, float("nan"), [1]])
def test_what_is_no_whole_number_is_refused(number: Any) -> None:
    with pytest.raises(InvalidFrame, match=r"^skip must be a whole number from 0 to 1000000, not "):
        check_number("skip", number, 0, 1_000_000)


def test_a_message_is_posted_without_its_empty_fields() -> None:
    assert posted({"role": "user", "content": "x", "tool_calls": None, "tool_name": None}) == {
        "role": "user",
        "content": "x",
    }
    assert posted({"role": "assistant", "content": "", "tool_calls": []}) == {
        "role": "assistant",
        "content": "",
        "tool_calls": [],
    }


def test_of_a_row_only_what_can_be_appended_is_posted() -> None:
    row = SimpleNamespace(id=ID, role="tool", content="x", tool_call_id="call-1", tool_name="search", status="failed")
    assert posted(row) == {"role": "tool", "content": "x", "tool_call_id": "call-1", "tool_name": "search"}


def test_a_mapping_with_a_field_that_no_message_has_is_not_made_smaller_in_silence() -> None:
    shown = message_to_dict({"role": "user", "content": "x", "id": ID})
    with pytest.raises(InvalidFrame, match=r"^messages\[0\]\.id: is not known here$"):
        decoded({"messages": [posted(shown)]}, NewMessages)


def test_arguments_are_decoded_as_the_body_of_a_request() -> None:
    found = decoded({"messages": [{"role": "user", "content": "x"}]}, NewMessages)
    assert found.messages == [UserMessage("x")]


@pytest.mark.parametrize(
    "metadata",
    [{"a": object()}, {"a": {1, 2, object()}}, {(1, 2): 3}, {"a": "\ud800"}, {"\0": 1}, {"a": 1 + 2j}],
    ids=range(6),
)
def test_what_cannot_be_stored_as_json_is_refused(metadata: Any) -> None:
    with pytest.raises(InvalidFrame):
        decoded({"metadata": metadata}, NewConversation)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_json_does_not_have_is_refused(number: float) -> None:
    with pytest.raises(InvalidFrame):
        decoded({"metadata": {"a": number}}, NewConversation)


def test_what_contains_itself_is_refused() -> None:
    metadata: dict[str, Any] = {}
    metadata["a"] = metadata
    with pytest.raises(InvalidFrame):
        decoded({"metadata": metadata}, NewConversation)
