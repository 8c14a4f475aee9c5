# Every target makes the one environment it needs: a machine with Python 3.11, make and a package
# index is enough. PYTHON chooses the interpreter for a new environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test lint types bench clean

help:
	@echo "make demo    what a small Moshi recalls of minutes of talk, stock and patched"
	@echo "make test    run the tests"
	@echo "make lint    ruff: style and format"
	@echo "make types   pyright"
	@echo "make bench   the benchmarks of docs/results.md (two hours)"
	@echo "make clean   remove the environment and everything generated"

demo: $(READY)
	$(BIN)/ttt-cache demo

test: $(READY)
	$(BIN)/pytest -n 2

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/pyright

bench: $(READY)
	$(BIN)/python benchmarks/state_bytes.py
	$(BIN)/python benchmarks/step_time.py
	$(BIN)/python benchmarks/presets.py
	$(BIN)/python benchmarks/ttt_layers.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/recall.py
	$(BIN)/python benchmarks/distill_memory.py
	$(BIN)/python benchmarks/soak.py

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; choose one with make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[train,serve,ray,dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .ruff_cache .hypothesis
