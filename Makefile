# Everything runs in a virtual environment of its own, made when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORE := $(VENV)/.installed-core
DEV := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help quickstart test lint types check prove bench format clean
.DEFAULT_GOAL := help

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart: $(CORE) ## Tune the bundled base model, and see what that taught it
	$(BIN)/instil quickstart

test: $(DEV) ## Run the tests
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: $(DEV) ## Look for mistakes and unformatted code
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

types: $(DEV) ## Check the types
	$(BIN)/python -m mypy

check: lint types test ## Run lint, types and tests

prove: $(DEV) ## Run the longer proofs
	$(BIN)/python -m pytest -m prove -n auto --dist loadfile
	$(BIN)/python -m pytest -m load

bench: $(DEV) ## Run the benchmarks, one after the other
	@set -e; for file in benchmarks/bench_*.py; do \
		test -e "$$file" || { echo "no benchmarks yet"; break; }; \
		echo "== $$file"; $(BIN)/python "$$file"; \
	done

format: $(DEV) ## Format the code and mend what can be mended
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean: ## Remove the virtual environment and every cache
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The package with what runs and serves a model: what a user installs.
$(CORE): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing Instil into $(VENV), which takes a minute or two"
	$(PIP) install -q -c constraints.txt -e '.[serve]'
	@touch $@

# The package and all that its development takes; it holds the former.
$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing Instil and what its development takes into $(VENV), which takes a minute or two"
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	@touch $(CORE) $@
