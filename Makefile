# `make demo` and `make test` each set up all they need in $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint types package check clean

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("$(PYTHON) is %d.%d, and Python 3.10 or later is needed: make PYTHON=..." % sys.version_info[:2] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)

# What running a model takes: MLX, which is small and fast to install.
$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[mlx]'
	touch $@

# All of it: both backends, training, tests.
$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[mlx,dev]'
	touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	@BIN=$(BIN) sh docs/demo.sh

test: $(VENV)/.dev
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/pyright --pythonpath $(BIN)/python

# What a user installs: the wheel, alone in an environment of its own, with its recipes and models.
package: $(BIN)/python
	rm -rf $(VENV)-wheel
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps -w $(VENV)-wheel .
	$(PYTHON) -m venv $(VENV)-wheel/env
	$(VENV)-wheel/env/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(VENV)-wheel/*.whl
	cd $(VENV)-wheel && env/bin/qlip doctor && env/bin/qlip generate "a cat" -o cat.png && env/bin/qlip reconstruct cat.png
	rm -rf $(VENV)-wheel

check: lint types package test

clean:
	rm -rf $(VENV) $(VENV)-wheel demo-out
