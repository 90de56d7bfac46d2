# Two commands do everything: `make demo` and `make test`. Both set up .venv on an empty machine.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint format check bench faults stage-gains clean

demo: $(VENV)/.demo
	$(BIN)/python -m tools.demo

test: $(VENV)/.test
	$(MAKE) --no-print-directory check
	$(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

stage-gains: $(VENV)/.demo
	$(BIN)/python -m tools.stage_gains

bench: $(VENV)/.test
	$(BIN)/python -m benchmarks.run

faults: $(VENV)/.test # QUICK=1: minutes instead of an hour
	$(BIN)/python -m tests.faults.run $(if $(QUICK),--quick)
	CLIPER_FUZZ=$(if $(QUICK),1000,10000) $(BIN)/python -m pytest -q --timeout=0 --durations=0 tests/faults/test_fuzz.py

$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist
