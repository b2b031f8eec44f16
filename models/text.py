"""What Postgres can hold as text: no NUL and no lone surrogate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

REPLACEMENT = "\ufffd"


def is_storable(text: str) -> bool:
    """Whether `text` can be stored as it is."""
    if text.isascii():
        return "\0" not in text
    if "\0" in text:
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def clean(value: Any) -> Any:
    """A JSON value with all of its text made storable."""
    match value:
        case str():
            return value if is_storable(value) else _join_surrogates(value.replace("\0", REPLACEMENT))
        case Mapping():
            return {clean(key): clean(item) for key, item in value.items()}
        case list() | tuple():
            return [clean(item) for item in value]
    return value


class TextCleaner:
    """Makes a stream of chunks storable; a surrogate pair that is split between two chunks is put together."""

    __slots__ = ("_high",)

    def __init__(self) -> None:
        self._high = ""  # a high surrogate that waits for its other half

    def clean(self, chunk: str) -> str:
        """The storable text of `chunk`, less a last half of a pair, which comes with the next chunk."""
        if not self._high and is_storable(chunk):
            return chunk
        chunk = self._high + chunk
        self._high = ""
        if chunk and "\ud800" <= chunk[-1] <= "\udbff":
            self._high, chunk = chunk[-1], chunk[:-1]
        return _join_surrogates(chunk.replace("\0", REPLACEMENT))

    def finish(self) -> str:
        """What was held back, once the stream is over."""
        rest, self._high = self._high, ""
        return REPLACEMENT if rest else ""


def _join_surrogates(text: str) -> str:
    # UTF-16 with surrogatepass joins adjacent halves into the character they mean; what stays alone is replaced.
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
