# Two commands for a fresh machine with Python 3.11 or newer: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Of 28,000 modules that are installed for tests few are imported, and pip would compile all (LOG.md).
PIP_INSTALL := -m pip install --quiet --no-compile
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart quickstart-base-vocabulary inputs test test-beam lint clean

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
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# In an environment of its own over the other one: Beam wants an older protobuf.
test-beam: $(VENV)-beam/installed
	$(VENV)-beam/bin/python -m pytest -n 0 -o filterwarnings=default tests/data/test_beam.py

$(VENV)-beam/installed: $(VENV)/installed-dev
	$(PYTHON) -m venv $(VENV)-beam
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > $$($(VENV)-beam/bin/python -c 'import site; print(site.getsitepackages()[0])')/beside.pth
	$(VENV)-beam/bin/python $(PIP_INSTALL) 'apache-beam>=2.70' 'sentencepiece<0.2.3'
	touch $@

lint: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/pyright

$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "cpt_jax needs Python 3.11 or newer, this is %d.%d: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) --requirement requirements.txt
	$(BIN)/python $(PIP_INSTALL) --no-deps --editable .
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(BIN)/python $(PIP_INSTALL) --requirement requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-beam runs .cache
