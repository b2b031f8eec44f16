# `make quick` after each change, `make check` before a merge: that is what CI runs (.ci/run). CONTRIBUTING.md has more.
.PHONY: quick unit check test system-postgres lint types layers web page format lock upgrade mutants bench dev

# Where it is set, as in many containers, each process compiles each module anew, and all below takes twice as long.
export PYTHONDONTWRITEBYTECODE =

# All three at once; what fails is named at the end.
quick:
	@$(MAKE) --no-print-directory --jobs --keep-going --output-sync=target unit lint types

unit:
	uv run pytest -q -n 0 -m "not slow" --hypothesis-profile=quick tests/unit

check: test system-postgres lint types layers web

test:
	uv run pytest

system-postgres:
	scripts/on_system_postgres

lint:
	uv run ruff check
	uv run ruff format --check

types:
	uv run mypy

layers:
	uv run lint-imports

web:
	scripts/web run check
	scripts/web run test

# The page of web/, once more, where server/page/NOT_BUILT says why it is not there; `uv run` builds it by itself when
# its sources have changed.
page:
	uv sync --reinstall-package anynode

format:
	uv run ruff check --fix
	uv run ruff format

# Writes the resolved versions: all of them to requirements-dev.txt and into pyproject.toml, and those that production
# installs to requirements.txt. What is locked already stays as it is.
EXPORT := uv export --quiet --no-emit-project --no-header --no-annotate

lock:
	$(EXPORT) --all-extras --all-groups --output-file requirements-dev.txt
	$(EXPORT) --no-default-groups --no-hashes --output-file requirements.txt
	python3 scripts/lock.py

# The same, with the newest versions.
upgrade:
	python3 scripts/lock.py --clear
	uv lock --quiet --upgrade
	$(MAKE) lock

# Breaks the product in many places, one at a time, and fails where no test notices; not part of CI.
mutants:
	uv run python -m scripts.mutants

bench:
	uv run anynode bench

dev:
	uv run anynode dev
