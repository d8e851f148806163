# `make demo` and `make test` on a fresh machine need python3 (3.11 to 3.13) with venv, nothing else.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
DEMO := demo-trace
FAULT ?= rope_interleaved
WORKERS ?= 2
COMPILED := .venv/compiled

.PHONY: demo test test-oldest lint clean

# An explain that finds a fault ends with 1, and here there is one to find.
demo: .venv/installed
	$(BIN)/python -m jaxref dump tiny --output $(DEMO)/trace
	$(BIN)/python -m oracle plant tiny --fault $(FAULT) --output $(DEMO)/engine-$(FAULT) --quiet
	$(BIN)/python -m oracle explain tiny $(DEMO)/engine-$(FAULT) || test $$? = 1

# One thread a worker: two threads on tiny matrices wait for each other wherever another worker has a core.
# A file's tests stay together, so that its models are made and its programs loaded once; in the order of their paths, in
# which the last ones are short: no worker waits long for the other at the end.
# What one worker compiled the others, and the commands that they start, take from a folder that each run begins anew.
test: export OMP_NUM_THREADS := 1
test: export JAX_COMPILATION_CACHE_DIR := $(CURDIR)/$(COMPILED)
test: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS := 0
test: export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES := -1
test: .venv/tested lint
	rm -rf $(COMPILED)
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

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

# The oldest transformers that `oracle hf` works with; its tests run against it in an environment of their own.
test-oldest:
	$(PYTHON) -m venv .venv/oldest
	.venv/oldest/bin/python -m pip --disable-pip-version-check --quiet install -c constraints.txt -e '.[test]' transformers==5.0.0
	.venv/oldest/bin/python -m pytest tests/oracle/test_hf_dump.py tests/test_hf_parity.py -k "not 30b"

clean:
	rm -rf .venv $(DEMO) build *.egg-info
