# Every target sets up what it needs; `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup train test test-fast lint format docs tiny clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY)  ## make the virtual environment with the pinned libraries

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 11) and f"Python 3.11 or newer is needed, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

train: $(READY)  ## fine-tune the embedded model on the embedded data, offline (ARGS='lora.r=4 ...')
	HF_HUB_OFFLINE=1 $(BIN)/python -m sft.train $(ARGS)

test: $(READY)  ## run every test, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-fast: $(READY)  ## run the tests that take seconds
	$(BIN)/python -m pytest tests/unit $(ARGS)

lint: $(READY)  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## put the code into its one style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)  ## build the pages of docs/ as a site in site/
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/python scripts/settings_page.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

tiny: $(READY)  ## build the embedded model and data anew from scratch (minutes)
	$(BIN)/python scripts/build_tiny.py

clean:  ## remove the environment and caches, and no run
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
