"""Strict JSON: what could be read in two ways, or could not be stored, is refused with its reason."""

from __future__ import annotations

import pytest

from anynode.server.errors import InvalidFrame
from anynode.server.protocol.strict_json import strict_json


def test_what_json_can_say_is_decoded() -> None:
    assert strict_json('{"a": [1, 2.5, true, null, "\\ud83d\\ude00"]}', "it") == {"a": [1, 2.5, True, None, "😀"]}


def test_what_only_looks_like_half_a_surrogate_pair_is_decoded() -> None:
    assert strict_json('["\\\\u0000", "\\\\ud83d", "\\ud83d\\ude00"]', "it") == ["\\u0000", "\\ud83d", "😀"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "it is not JSON"),
        ('{"a": 1, "a": 2}', "it has a duplicate key"),
        ('{"a": NaN}', "it has NaN, which is not JSON"),
        ('{"a": 1e999}', "it has a number that is too large: 1e999"),
        ('{"a": ["\\u0000"]}', "it has a NUL or half a surrogate pair in 'a'"),
        ('{"\\ud83d": 1}', "it has a NUL or half a surrogate pair in '\\ud83d'"),
        ('{"a": {"b": "\\uDEAD"}}', "it has a NUL or half a surrogate pair in 'b'"),
        ('{"a": "\ud83d"}', "it has a NUL or half a surrogate pair in 'a'"),  # in the text itself
        ('["\\ud83d"]', "it has a NUL or half a surrogate pair in a text"),
        ("[" * 100_000, "it is nested too deeply"),
    ],
)
def test_anything_else_is_refused_with_its_reason(text: str, said: str) -> None:
    with pytest.raises(InvalidFrame) as refused:
        strict_json(text, "it")
    assert refused.value.message.startswith(said)
