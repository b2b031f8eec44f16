# `make quick` after each change, `make check` before a merge: that is what CI runs (.ci/run). CONTRIBUTING.md has more.
.PHONY: quick unit check test system-postgres first-command lint types layers web page format lock upgrade mutants bench \
	hostile dev

# The uv of the README's commands where they have been run, or else that of this machine; the developers' tools with it.
UV := $(firstword $(wildcard .uv/bin/uv) uv)
RUN := $(UV) run --dev

# Where it is set, as in many containers, each process compiles each module anew, and all below takes twice as long.
export PYTHONDONTWRITEBYTECODE =

# All three at once; what fails is named at the end.
quick:
	@$(MAKE) --no-print-directory --jobs --keep-going --output-sync=target unit lint types

unit:
	$(RUN) pytest -q -n 0 -m "not slow" --hypothesis-profile=quick tests/unit

check: test system-postgres first-command lint types layers web

test:
	$(RUN) pytest

system-postgres:
	scripts/on_system_postgres

first-command:
	scripts/first_command

lint:
	$(RUN) ruff check
	$(RUN) ruff format --check

types:
	$(RUN) mypy

layers:
	$(RUN) lint-imports

web:
	scripts/web run check
	scripts/web run test

# The page of web/, once more, where server/page/NOT_BUILT says why it is not there; `uv run` builds it by itself when
# its sources have changed.
page:
	$(UV) sync --inexact --reinstall-package anynode

format:
	$(RUN) ruff check --fix
	$(RUN) ruff format

# Writes the resolved versions: all of them to requirements-dev.txt and into pyproject.toml, and those that production
# installs to requirements.txt. What is locked already stays as it is.
EXPORT := $(UV) export --quiet --no-emit-project --no-header --no-annotate

lock:
	$(EXPORT) --all-extras --all-groups --output-file requirements-dev.txt
	$(EXPORT) --no-default-groups --no-hashes --output-file requirements.txt
	python3 scripts/lock.py

# The same, with the newest versions.
upgrade:
	python3 scripts/lock.py --clear
	$(UV) lock --quiet --upgrade
	$(MAKE) lock

# Breaks the product in many places, one at a time, and fails where no test notices; not part of CI.
mutants:
	$(RUN) python -m scripts.mutants

bench:
	$(RUN) anynode bench

# Attacks a node and exits with 1 if that cost more than it may: all attacks, or some (make hostile ATTACK="pings limbo"),
# or less of everything (make hostile QUICK=1). docs/security-tests.md says what each does.
hostile:
	@$(RUN) python -m bench.hostile $(if $(QUICK),--quick) $(ATTACK)

dev:
	$(UV) run anynode dev
