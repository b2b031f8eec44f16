"""docs/security-tests.md names exactly the attacks of `make hostile`, what each does and its bounds."""

from __future__ import annotations

import re

from bench.hostile.attacks import ROWS
from bench.hostile.figures import COMMON, rows_of
from bench.report import short
from tests.kit.repository import TOP

DOCUMENT = (TOP / "docs" / "security-tests.md").read_text()


def test_the_table_has_each_attack_with_what_it_does_and_its_bounds() -> None:
    assert [row[:3] for row in rows_of(DOCUMENT)] == [(row.name, row.what, row.bound) for row in ROWS]


def test_the_common_bounds_are_those_of_the_program() -> None:
    said = re.findall(r"^\| ([a-zRS0-9 ]+) ≤ (\S+)(?: (\w+))? \|", DOCUMENT, re.M)
    assert [f"{label}, {unit} ≤ {most}" if unit else f"{label} ≤ {most}" for label, most, unit in said] == [
        f"{bound.label} ≤ {short(bound.most)}" for bound in COMMON
    ]


def test_each_attack_says_what_it_does_in_one_sentence() -> None:
    assert [row.name for row in ROWS if not re.fullmatch(r"[A-Z][^|]*\.", row.what)] == []
