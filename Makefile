# Two commands for a fresh machine with Python 3.11 or newer: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart quickstart-base-vocabulary inputs test lint clean

quickstart: inputs
	$(BIN)/cpt run quickstart --workdir runs/quickstart

# The same budget without growing the vocabulary, and one page that compares the two.
quickstart-base-vocabulary: inputs
	$(BIN)/cpt run quickstart_base_vocabulary --workdir runs/quickstart-base-vocabulary

inputs: $(VENV)/installed
	$(BIN)/python -m configs.quickstart_inputs

test: $(VENV)/installed-dev inputs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/pyright

$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "cpt_jax needs Python 3.11 or newer, this is %d.%d: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) runs .cache
