# Two commands: `make demo` runs the whole loop, `make test` passes the tests. Both set everything up first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test bench check format lint types imports clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("mop needs Python 3.11 or newer, found " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[exec,dev]'
	touch $@

demo: setup
	$(BIN)/mopsim demo --out reports/demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

bench: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench/speed.py reports/benchmarks

check: setup format lint types imports test

format: setup
	$(BIN)/ruff format --check .

lint: setup
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

imports: setup
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
