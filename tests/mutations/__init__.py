"""Ways to break the product, a module for each part of it; `make mutants` sees that the tests notice each one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tests.mutations import api, database, engine, store
from tests.mutations.mutation import Mutation

MUTATIONS: Final[Sequence[Mutation]] = (*engine.MUTATIONS, *database.MUTATIONS, *api.MUTATIONS, *store.MUTATIONS)
