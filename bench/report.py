"""Figures, and the table of them. No I/O."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Target:
    """An upper bound to reach: of the ratio product/floor, of the product's own figure, or of its worst round."""

    of: Literal["ratio", "product", "worst"]
    most: float


@dataclass(frozen=True)
class Figure:
    """One number of one round; the label names the unit."""

    label: str
    value: float
    target: Target | None = None


@dataclass(frozen=True)
class Spread:
    """The median of the rounds, with the lowest and the highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        if self.low == self.high:
            return short(self.median)
        return f"{short(self.median)} ({short(self.low)}–{short(self.high)})"


@dataclass(frozen=True)
class Line:
    """One label over all rounds. `ratio` is product/floor of each round, or None if the floor has no such figure."""

    label: str
    product: Spread
    floor: Spread | None
    ratio: Spread | None
    target: Target | None

    @property
    def verdict(self) -> str:
        """Return the target, and whether the median or the worst round meets it; an empty text without a target."""
        if self.target is None:
            return ""
        spread = self.ratio if self.target.of == "ratio" else self.product
        if spread is None:
            return ""
        reached = spread.high if self.target.of == "worst" else spread.median
        unit = "×" if self.target.of == "ratio" else ""
        return f"≤ {short(self.target.most)}{unit} {'met' if reached <= self.target.most else 'MISSED'}"


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that this percentage of the values does not exceed (nearest rank)."""
    if not values:
        raise ValueError("no values")
    rank = math.ceil(len(values) * percent / 100)
    return sorted(values)[max(rank, 1) - 1]


def lines(product: Sequence[Sequence[Figure]], floor: Sequence[Sequence[Figure]]) -> list[Line]:
    """Make one line for each label of the product, from the figures of each round."""
    ours, theirs = _by_label(product), _by_label(floor)
    targets = {figure.label: figure.target for figures in product for figure in figures}
    found = []
    for label, values in ours.items():
        beside = theirs.get(label)
        ratios = [] if beside is None else [mine / its for mine, its in zip(values, beside, strict=True) if its]
        found.append(
            Line(
                label,
                Spread.of(values),
                None if beside is None else Spread.of(beside),
                Spread.of(ratios) if ratios else None,
                targets[label],
            )
        )
    return found


def table(measures: Mapping[str, Sequence[Line]], *, has_floor: bool = True) -> str:
    """Format the lines of all measures, by name, in columns; without a floor it has no columns."""
    rows: list[tuple[str, ...]] = [("", "product", "floor", "product/floor", "target")]
    for name, found in measures.items():
        rows.append((name, "", "", "", ""))
        for line in found:
            floor, ratio = str(line.floor or "–"), str(line.ratio or "–")
            rows.append((f"  {line.label}", str(line.product), floor, ratio, line.verdict))
    if not has_floor:
        rows = [(label, product, verdict) for label, product, _, _, verdict in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def short(number: float) -> str:
    """Format a number with three significant digits and no exponent."""
    if number == 0 or not math.isfinite(number):
        return f"{number:g}"
    digits = 2 - math.floor(math.log10(abs(number)))
    text = f"{round(number, digits):,.{max(digits, 0)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _by_label(rounds: Sequence[Sequence[Figure]]) -> dict[str, list[float]]:
    by_label: dict[str, list[float]] = {}
    for figures in rounds:
        for figure in figures:
            by_label.setdefault(figure.label, []).append(figure.value)
    return by_label
