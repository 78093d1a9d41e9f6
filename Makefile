# `make demo` sets up and runs the main job; `make test` sets up and runs the tests. Both share one environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PACKS := $(wildcard plugins/*)
STAMP := $(VENV)/.ready

.PHONY: demo test lint bench clean

$(STAMP): pyproject.toml $(wildcard plugins/*/pyproject.toml)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "probekit needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[test,hf]' $(foreach pack,$(PACKS),-e $(pack))
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(STAMP)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

bench: $(STAMP)
	$(BIN)/python benchmarks/cost.py

clean:
	rm -rf $(VENV)
