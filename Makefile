# `make demo` and `make test` on a fresh machine need python3 (3.11 to 3.13) with venv, nothing else.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
DEMO := demo-trace

.PHONY: demo test lint clean

demo: .venv/installed
	$(BIN)/python -m jaxref dump --output $(DEMO)

test: .venv/tested lint
	$(BIN)/python -m pytest $(ARGS)

lint: .venv/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(PIP) install --editable .
	touch $@

.venv/tested: pyproject.toml constraints.txt .venv/installed
	$(PIP) install --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf .venv $(DEMO) build *.egg-info
