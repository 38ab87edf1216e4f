# The whole life of the project. Every target sets up what it needs and can be run again.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
CORES := $(shell nproc)

.PHONY: setup lock demo docs test test-fast coverage lint bench gpu gpu-wheels clean
.DELETE_ON_ERROR:

setup: $(STAMP)

# The lock is complete, so no resolver runs (with one, pip backtracks for ten minutes). pip says nothing while it unpacks, so a
# loop shows the size. The downloads are in .venv/tmp, because /tmp may be small.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(not (3, 11) <= v < (3, 14) and \
	    f"scfm needs Python 3.11 to 3.13, {sys.executable} is {v[0]}.{v[1]}: make setup PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing requirements.lock into .venv: 8.8 GB, and for a while the downloads too"
	@mkdir -p .venv/tmp
	@while sleep 10 && kill -0 $$$$; do du -sm .venv | awk '{printf "  %.1f GB\n", $$1 / 1000}'; done 2>/dev/null & \
	trap "kill $$!" EXIT; \
	TMPDIR=$(CURDIR)/.venv/tmp $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	@rm -rf .venv/tmp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $(STAMP)

# The newest versions in the ranges of pyproject.toml. It installs nothing.
lock:
	mkdir -p runs
	$(PYTHON) -m pip install --dry-run --ignore-installed --quiet --report runs/lock.json '.[all,dev]'
	$(PYTHON) .ci/lock.py runs/lock.json requirements.lock

# DEMO: more options. A short one, to see that all parts work: make demo DEMO='--vae-steps 60 --paths-per-prompt 5 train.steps=20
# train.warmup_steps=0 train.global_batch_size=32 evaluate.samples=50'.
demo: setup
	$(BIN)/python -m recipes.demo $(DEMO)

# Tests start many Python processes, which would each compile the project, 0.2 s, where the environment sets this.
test test-fast coverage: export PYTHONDONTWRITEBYTECODE :=

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
	$(BIN)/hadolint Dockerfile
	$(BIN)/codespell

# The documentation as a site, in runs/site. `mkdocs serve` shows it while you write.
docs: export NO_MKDOCS_2_WARNING := 1
docs: setup
	$(BIN)/mkdocs build --strict --quiet

bench: setup
	failed=0; for script in tests/benchmarks/bench_*.py; do $(BIN)/python $$script || failed=1; done; exit $$failed

# What one GPU can tell in 12 minutes: tests, benchmarks, the step at true size. Without a GPU the same runs on a driver that computes
# nothing. A machine without .venv and network needs a Python with torch, and the wheels of `make gpu-wheels`. DAY: more options.
gpu: $(if $(wildcard runs/gpu_wheels/*.whl),,setup)
	if test -e $(STAMP); then $(BIN)/python tests/benchmarks/gpu_day.py $(DAY); \
	else $(PYTHON) tests/benchmarks/gpu_day.py --wheels runs/gpu_wheels $(DAY); fi

gpu-wheels: setup
	$(BIN)/python tests/benchmarks/gpu_wheels.py

clean:
	rm -rf .venv runs
