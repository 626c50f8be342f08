# `make demo` runs the whole loop, `make test` all tests, `make quick` the fast checks. All set everything up first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# What one process has compiled is there for the next.
export PYTHONDONTWRITEBYTECODE :=
TESTED := OMP_NUM_THREADS=1
QUICK := tests/spec tests/docs tests/api tests/capability/test_table.py tests/capability/test_exports.py \
	tests/sim/test_engine.py tests/sim/test_cost.py tests/sim/test_layers.py \
	tests/sim/test_strategies.py tests/sim/test_cli.py tests/exec/test_without_torch.py

.PHONY: setup demo test quick bench gpu kills docs check format lint types imports collected clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("mop needs Python 3.11 or newer, found " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'installing torch and the rest into $(VENV), which takes some minutes'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[exec,dev]'
	$(BIN)/python -c 'import mopexec.modules.fully_shard, mopexec.run.worker, mopsim.loop, torch._dynamo'  # compiles them
	touch $@

demo: setup
	$(BIN)/mopsim demo --out reports/demo

test: setup
	$(TESTED) $(BIN)/python -m pytest -n 3 --dist loadgroup

quick: setup format lint imports
	$(TESTED) $(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "not slow" $(QUICK)

bench: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench/speed.py reports/benchmarks

gpu: setup
	PYTHONPATH=. $(BIN)/python tests/gpu/report.py reports/gpu

kills: setup
	PYTHONPATH=. $(BIN)/python tests/bench/kills.py reports/executor

docs: setup
	$(BIN)/python docs/generate.py

# One core checks types while the other compiles what the tests' processes import.
check: setup
	$(MAKE) -j 2 format lint imports types collected
	$(MAKE) test

collected: setup
	@$(TESTED) $(BIN)/python -m pytest -qq --collect-only > /dev/null || true  # `test` says what is wrong

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
