# The whole life of the project. Every target sets up what it needs and can be run again.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup demo test lint bench clean
.DELETE_ON_ERROR:

setup: $(STAMP)

# The lock is complete, so no resolver runs (with one, pip backtracks for ten minutes).
$(STAMP): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $(STAMP)

demo: setup
	$(BIN)/python -m recipes.demo

# Two workers, of which one has what must not run side by side: tests/conftest.py.
test: setup
	$(BIN)/python -m pytest -n 2

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck -x slurm/*.sh slurm/clusters/*.env
	$(BIN)/codespell

bench: setup
	failed=0; for script in tests/benchmarks/bench_*.py; do $(BIN)/python $$script || failed=1; done; exit $$failed

clean:
	rm -rf .venv runs
