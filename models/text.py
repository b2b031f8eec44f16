"""Text that Postgres can hold: without NUL and without lone surrogates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

REPLACEMENT = "\ufffd"


def is_storable(text: str) -> bool:
    """Return whether Postgres can hold `text`."""
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
    """Return a JSON value with all of its text made storable."""
    match value:
        case str():
            return value if is_storable(value) else _join_surrogates(value.replace("\0", REPLACEMENT))
        case Mapping():
            return {clean(key): clean(item) for key, item in value.items()}
        case list() | tuple():
            return [clean(item) for item in value]
    return value


class TextCleaner:
    """Makes a stream of chunks storable. The halves of a surrogate pair in two chunks are put together."""

    __slots__ = ("_high",)

    def __init__(self) -> None:
        self._high = ""  # a high surrogate that waits for its other half

    def clean(self, chunk: str) -> str:
        """Return the storable text of `chunk`. The first half of a pair at its end is held back."""
        if not self._high and is_storable(chunk):
            return chunk
        chunk = self._high + chunk
        self._high = ""
        if chunk and "\ud800" <= chunk[-1] <= "\udbff":
            self._high, chunk = chunk[-1], chunk[:-1]
        return _join_surrogates(chunk.replace("\0", REPLACEMENT))

    def finish(self) -> str:
        """Return the text that was held back, once the stream is over."""
        rest, self._high = self._high, ""
        return REPLACEMENT if rest else ""


def _join_surrogates(text: str) -> str:
    # UTF-16 with surrogatepass joins adjacent halves into the character they mean; what stays alone is replaced.
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
