# In a fresh clone: `make quickstart` or `make test`. Each sets up .venv first, once.
#
#   make test PYTHON=python3.12
#   make quickstart TORCH_INDEX_URL=<index URL of the torch build you want, for instance the CPU one>

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
VENV_FLAGS ?=
CONSTRAINTS ?= requirements/constraints.txt
# What pip installs first; empty where torch is already present (a container, with --system-site-packages).
TORCH ?= $(shell grep '^torch==' $(CONSTRAINTS))
TORCH_INDEX_URL ?=
EXTRAS ?= test
TEST_PROCESSES ?= 2
TESTS ?= tests

PIP_INSTALL := $(VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-compile --progress-bar off
# Let Python write bytecode even if the shell forbids it; otherwise each of many processes compiles every library.
export PYTHONDONTWRITEBYTECODE :=

# The environment is rebuilt when this key changes: the interpreter, the requirements, or how they are installed.
ENVIRONMENT_KEY = $(shell { $(PYTHON) -c 'import sys; print(sys.version, sys.base_prefix)'; \
	cat pyproject.toml $(CONSTRAINTS); \
	echo '$(TORCH) $(TORCH_INDEX_URL) $(VENV_FLAGS) $(EXTRAS)'; } | sha256sum | cut -c1-16)

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: install
install: ## create or refresh .venv
	@command -v $(firstword $(PYTHON)) >/dev/null || { echo "make: no interpreter '$(PYTHON)'; set PYTHON=" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: $$($(PYTHON) --version) is too old: Python 3.11 or newer is required; set PYTHON=" >&2; exit 2; }
	@if [ "$$(cat $(VENV)/.key 2>/dev/null || true)" != "$(ENVIRONMENT_KEY)" ]; then \
		echo "Setting up $(VENV) with $$($(PYTHON) --version): one minute, more if torch comes with CUDA …"; \
		rm -rf $(VENV); \
		$(PYTHON) -m venv $(VENV_FLAGS) $(VENV); \
		$(if $(TORCH),$(PIP_INSTALL) -c $(CONSTRAINTS) '$(TORCH)' $(if $(TORCH_INDEX_URL),--index-url '$(TORCH_INDEX_URL)');) \
		$(PIP_INSTALL) -c $(CONSTRAINTS) -e '.[$(EXTRAS)]'; \
		echo "$(ENVIRONMENT_KEY)" > $(VENV)/.key; \
	fi

.PHONY: quickstart
quickstart: install ## the whole method on real text, on a CPU; report in runs/quickstart
	@$(VENV)/bin/python examples/quickstart/run.py

.PHONY: test
test: install ## all tests except the slow ones
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n $(TEST_PROCESSES) --dist worksteal -m 'not slow' $(TESTS)

.PHONY: test-slow
test-slow: install ## the slow tests
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -m slow $(TESTS)

.PHONY: checks
checks: install ## linter, formatter and type checker (also as pre-commit hooks)
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

.PHONY: clean
clean: ## remove .venv, caches and build output, but not runs/ and data/
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find megatron_kd tools tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
