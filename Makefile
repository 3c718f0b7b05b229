# make demo | test | fast-test | clean. Needs python3 (3.11 or newer, with venv) and make; installs into .venv, once.

PYTHON ?= python3
BIN := .venv/bin
# A file stays in one worker, so that no fixture is built twice; in their order, which begins with the longest.
PYTEST := $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test fast-test clean

# Compiled programs, kept between runs: the tests' second run takes half the time.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.2

demo: .venv/installed
	$(BIN)/gvl demo

test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST)

fast-test: .venv/installed-test
	$(PYTEST) -m "not slow"

# The stamps: nothing is installed again until pyproject.toml changes.
.venv/installed: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/installed-test: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --editable '.[test]'
	touch .venv/installed $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$$($(PYTHON) --version 2>&1 || echo no $(PYTHON)), expected Python 3.11 or newer; run make PYTHON=python3.11" >&2; \
	  exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; echo "no venv module; install it (on Debian: python3-venv)" >&2; exit 1; }

clean:
	rm -rf .venv .cache build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
