# The whole life of the project. Every target sets up what it needs and can be run again.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
CORES := $(shell nproc)

.PHONY: setup demo test test-fast coverage lint bench clean
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

# Everything. As many workers as cores, and lanes for what mostly waits: tests/conftest.py.
test: setup
	$(BIN)/python -m pytest -n auto --dist loadgroup

# What starts no other process; before a commit.
test-fast: setup
	$(BIN)/python -m pytest -n $(CORES) --dist worksteal -m "not processes"

# Lines and branches that `make test` runs, in its processes too; the HTML is runs/coverage/html/index.html.
coverage: setup
	rm -rf runs/coverage && mkdir -p runs/coverage
	-$(BIN)/python -m coverage run -m pytest -n auto --dist loadgroup
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage html --quiet --directory runs/coverage/html
	@for package in $$(dirname scfm_core/*/__init__.py) recipes data_tools; do \
	    printf '%-24s' $$package; $(BIN)/python -m coverage report --include="$$package/*" | tail -n 1; done

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
