"""A mutation: an exact replacement that breaks the product, and the tests that should notice it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Change(NamedTuple):
    """A replacement of `old`, which is `times` times in the file, by `new`. `within` restricts it to one paragraph."""

    file: str
    old: str
    new: str
    times: int = 1
    within: str = ""


@dataclass(frozen=True)
class Mutation:
    """What is broken, in words; where; and tests, below tests/, that should notice, the likeliest first."""

    name: str
    changes: Sequence[Change]
    tests: Sequence[str]


def paragraph(text: str, within: str) -> tuple[int, int]:
    """Return the start and the end of the only paragraph that has `within` in it; all of the text if it is empty."""
    if not within:
        return 0, len(text)
    if text.count(within) != 1:
        raise ValueError(f"{within!r} is there {text.count(within)} times")
    at = text.index(within)
    end = text.find("\n\n", at)
    return max(text.rfind("\n\n", 0, at), 0), len(text) if end < 0 else end


def changed(text: str, change: Change) -> str:
    """The text after a change. Raises ValueError where it does not apply."""
    start, end = paragraph(text, change.within)
    times = text.count(change.old, start, end)
    if times != change.times:
        raise ValueError(f"{change.old!r} is there {times} times, not {change.times}")
    return text[:start] + text[start:end].replace(change.old, change.new) + text[end:]


def broken(mutation: Mutation, top: Path) -> dict[str, str]:
    """The files of a copy that a mutation changes, as it leaves them. Raises ValueError where it does not apply."""
    files: dict[str, str] = {}
    for change in mutation.changes:
        try:
            files[change.file] = changed(files.get(change.file) or (top / change.file).read_text(), change)
        except (OSError, ValueError) as error:
            raise ValueError(f"{mutation.name}: {change.file}: {error}") from error
    return files
