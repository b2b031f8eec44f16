"""Every mutation still applies to the product, so that `make mutants` breaks what it says it breaks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutations import MUTATIONS
from tests.mutations.mutation import Mutation, broken

TOP = Path(__file__).parents[2]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_applies_and_changes_what_it_names(mutation: Mutation) -> None:
    files = broken(mutation, TOP)
    assert files
    for file, text in files.items():
        assert text != (TOP / file).read_text()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_tests_that_should_notice_a_mutation_exist(mutation: Mutation) -> None:
    assert mutation.tests
    for test in mutation.tests:
        file, _, name = test.partition("::")
        assert f"def {name}" in (TOP / "tests" / file).read_text()


def test_no_two_mutations_have_the_same_name() -> None:
    names = [mutation.name for mutation in MUTATIONS]
    assert sorted({*names}) == sorted(names)
