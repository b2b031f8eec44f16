"""What Postgres can hold, however a stream is cut into chunks."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from anynode.models.text import REPLACEMENT, TextCleaner, clean, is_storable

# Characters of trouble, often enough to meet each other.
NASTY = st.text(st.sampled_from("\0\ud83d\ude00aé")) | st.text(
    st.sampled_from("\0\ud800\ud83d\udbff\udc00\ude00\udfffa\U0001f600é") | st.characters(codec=None)
)


def streamed(chunks: list[str]) -> str:
    cleaner = TextCleaner()
    return "".join([*map(cleaner.clean, chunks), cleaner.finish()])


def is_text_of_postgres(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


@given(NASTY)
def test_storable_is_what_has_no_nul_and_no_lone_surrogate(text: str) -> None:
    assert is_storable(text) == is_text_of_postgres(text)


@given(NASTY)
def test_cleaned_text_is_storable(text: str) -> None:
    assert is_text_of_postgres(clean(text))


@given(st.text())
def test_storable_text_is_left_as_it_is(text: str) -> None:
    text = text.replace("\0", "")
    assert clean(text) == streamed(list(text)) == text


@given(st.lists(NASTY))
@example(["\ud83d", "\ude00"])
@example(["\ud83d", "", "\ude00"])
@example(["\ud83d", "\ud83d", "\ude00"])
@example(["a\ud83d"])
@example(["\ud83d", "a"])
def test_any_chunking_gives_the_same_as_cleaning_the_whole(chunks: list[str]) -> None:
    assert streamed(chunks) == clean("".join(chunks))


@given(st.lists(NASTY))
def test_every_chunk_by_itself_is_storable(chunks: list[str]) -> None:
    cleaner = TextCleaner()
    assert all(is_text_of_postgres(cleaner.clean(chunk)) for chunk in chunks)


@given(NASTY, NASTY)
def test_a_cleaner_that_has_finished_begins_anew(before: str, after: str) -> None:
    cleaner = TextCleaner()
    cleaner.clean(before)
    cleaner.finish()
    assert cleaner.clean(after) + cleaner.finish() == clean(after)


def test_a_pair_that_was_split_between_chunks_is_put_together() -> None:
    assert streamed(["a\ud83d", "\ude00b"]) == "a\U0001f600b"


def test_a_half_that_stays_alone_is_replaced() -> None:
    assert streamed(["a\ud83d", "b\ude00", "\ud83d"]) == f"a{REPLACEMENT}b{REPLACEMENT}{REPLACEMENT}"


def test_nul_is_replaced() -> None:
    assert clean("a\0b") == f"a{REPLACEMENT}b"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | NASTY,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NASTY, inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
def test_all_text_within_a_json_value_is_cleaned(value: Any) -> None:
    assert all(map(is_text_of_postgres, _texts(clean(value))))


def _texts(value: Any) -> list[str]:
    match value:
        case str():
            return [value]
        case dict():
            return [*value, *(text for item in value.values() for text in _texts(item))]
        case list():
            return [text for item in value for text in _texts(item)]
    return []


@pytest.mark.parametrize("value", [None, True, 0, 1.5, "a", [1, ["b"]], {"a": {"b": [None]}}])
def test_a_json_value_without_trouble_is_left_as_it_is(value: Any) -> None:
    assert clean(value) == value
