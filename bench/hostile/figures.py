"""The figures of attacks, their bounds, and the tables of both. No I/O."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias, get_args

from bench.report import percentile, short

Column: TypeAlias = Literal["before", "after"]
COLUMNS: Final[tuple[Column, ...]] = get_args(Column)

BESIDE: Final = "first token p99 beside alone, ms"
REFUSED: Final = "bystander refused"
GROWTH: Final = "RSS growth, MB"
TRACEBACKS: Final = "tracebacks"
LOG: Final = "log, kB"
STATUS: Final = "exit status"

TABLE_BEGINS: Final = "<!-- figures: written by `make hostile` -->"
TABLE_ENDS: Final = "<!-- end of the figures -->"
NONE: Final = "–"


@dataclass(frozen=True)
class Bound:
    """The most that a figure may be; the label names figure and unit."""

    label: str
    most: float

    def __str__(self) -> str:
        return f"{self.label} ≤ {short(self.most)}"


# What holds under every attack that does not say otherwise.
COMMON: Final = (
    Bound(BESIDE, 100),
    Bound(REFUSED, 0),
    Bound(GROWTH, 128),
    Bound(TRACEBACKS, 0),
    Bound(LOG, 256),
    Bound(STATUS, 0),
)


@dataclass(frozen=True)
class Delays:
    """How long the bystander waited for first tokens, in milliseconds."""

    p50: float
    p99: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Delays:
        """Return the delays of the values; without any, a bystander who waited for ever."""
        if not values:
            return cls(float("inf"), float("inf"), float("inf"))
        return cls(percentile(values, 50), percentile(values, 99), max(values))

    def __str__(self) -> str:
        return f"{short(self.p50)} / {short(self.p99)} / {short(self.most)}"


@dataclass(frozen=True)
class Outcome:
    """All that was measured of one attack. Memory is the node's resident set in MB: before, at its peak, after."""

    name: str
    alone: Delays
    attacked: Delays
    memory: tuple[float, float, float]
    figures: Mapping[str, float]
    bounds: Sequence[Bound]
    notes: Sequence[str] = field(default=())

    @property
    def broken(self) -> list[Bound]:
        """Return the bounds that were broken, those without a figure included."""
        return [bound for bound in self.bounds if not self.figures.get(bound.label, float("inf")) <= bound.most]

    @property
    def own(self) -> str:
        """Return the attack's own figures, those that no other column shows."""
        shown = {BESIDE, GROWTH, REFUSED, TRACEBACKS, LOG, STATUS}
        own = {label: value for label, value in self.figures.items() if label not in shown}
        return ", ".join(f"{label} {short(value)}" for label, value in own.items())

    @property
    def verdict(self) -> str:
        """Say that all bounds held, or which were broken, and by what figure."""
        if not self.broken:
            return "holds"
        return "BROKEN: " + ", ".join(
            f"{bound.label} {short(self.figures.get(bound.label, float('inf')))} > {short(bound.most)}"
            for bound in self.broken
        )

    @property
    def cell(self) -> str:
        """Say in one cell of the document's table what was measured."""
        parts = [f"p99 {short(self.attacked.p99)} ms", "RSS " + "→".join(short(mb) for mb in self.memory) + " MB"]
        for label in (REFUSED, TRACEBACKS, STATUS):
            if self.figures.get(label, 0):
                parts.append(f"{label} {short(self.figures[label])}")
        if any(bound.label == LOG for bound in self.broken):
            parts.append(f"{LOG} {short(self.figures[LOG])}")
        if self.own:
            parts.append(self.own)
        return ("**broken**: " if self.broken else "") + "; ".join(parts)


@dataclass(frozen=True)
class Row:
    """What the document says of an attack beside its figures."""

    name: str
    what: str
    bounds: Sequence[Bound]

    @property
    def bound(self) -> str:
        """Return the bounds that the attack has beside or instead of the common ones."""
        return ", ".join(str(bound) for bound in self.bounds if bound not in COMMON) or NONE


def bounds_of(*own: Bound) -> tuple[Bound, ...]:
    """Return an attack's bounds: its own, and the common ones that these do not replace."""
    said = {bound.label for bound in own}
    return (*own, *(bound for bound in COMMON if bound.label not in said))


def text_table(outcomes: Sequence[Outcome]) -> str:
    """Format what was measured for a terminal: each attack in two lines, its figures and its verdict."""
    rows = [("attack", "first token alone, under attack (p50 / p99 / max, ms)", "RSS, MB", "refused", "log, kB")]
    for outcome in outcomes:
        rows.append(
            (
                outcome.name,
                f"{outcome.alone}, {outcome.attacked}",
                " → ".join(short(mb) for mb in outcome.memory),
                short(outcome.figures.get(REFUSED, 0)),
                short(outcome.figures.get(LOG, 0)),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    said = [lines[0]]
    for line, outcome in zip(lines[1:], outcomes, strict=True):
        said.append(line)
        if outcome.own:
            said.append(f"    {outcome.own}")
        said.extend(f"    {note}" for note in outcome.notes)
        said.append(f"    {outcome.verdict}")
    return "\n".join(said)


def fill(document: str, rows: Sequence[Row], outcomes: Sequence[Outcome], column: Column) -> str:
    """Return the document with its table of figures written anew: a row for each attack, these outcomes in the column,
    and all other figures as they were. Raises ValueError for a document without the two marks."""
    head, begins, rest = document.partition(TABLE_BEGINS)
    table, ends, tail = rest.partition(TABLE_ENDS)
    if not begins or not ends:
        raise ValueError(f"the document has no place for the table: it needs the lines {TABLE_BEGINS} and {TABLE_ENDS}")
    known = {row[0]: row[3:] for row in rows_of(table)}
    measured = {outcome.name: outcome.cell for outcome in outcomes}
    lines = ["| attack | what it does | bounds of its own | before | after |", "|---|---|---|---|---|"]
    for row in rows:
        before, after = (
            measured.get(row.name, old) if one == column else old
            for one, old in zip(COLUMNS, known.get(row.name, (NONE, NONE)), strict=True)
        )
        lines.append(f"| `{row.name}` | {row.what} | {row.bound} | {before} | {after} |")
    return f"{head}{begins}\n\n" + "\n".join(lines) + f"\n\n{ends}{tail}"


def rows_of(table: str) -> list[tuple[str, ...]]:
    """Return the cells of a table of figures: the name of an attack, what it does, its bounds, before and after."""
    lines = re.findall(r"^\| `\w+` \|.*\|$", table, re.M)
    return [
        tuple(cell.strip(" `") if at == 0 else cell.strip() for at, cell in enumerate(line.strip("|").split(" | ")))
        for line in lines
    ]


def replaced(bounds: Sequence[Bound], given: Sequence[Bound]) -> tuple[Bound, ...]:
    """Return the bounds with those replaced that are given under the same label."""
    most = {bound.label: bound.most for bound in given}
    return tuple(Bound(bound.label, most.get(bound.label, bound.most)) for bound in bounds)
