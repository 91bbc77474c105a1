# Three commands, each from a fresh checkout: `make demo`, `make test`, `make setup`.
PYTHON ?= python3
RUN ?= runs/shapes
BIN := .venv/bin
READY := .venv/ready

.PHONY: setup demo test lint clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sd_mini needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(READY)

demo: $(READY)
	$(BIN)/python -m training.demo --run $(RUN)

test: $(READY)
	$(BIN)/python -m pytest -m "not slow and not gpu"

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf .venv runs
