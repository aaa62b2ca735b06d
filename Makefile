PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-stamp
LINT_TREE := build/lint-tree

.DEFAULT_GOAL := help
.PHONY: help setup test demo lint format clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## .venv with everything that tests and demo need; real models and data in the cache
	@$(BIN)/python -c "from deployfa.assets import ASSETS, fetch; [fetch(name, progress=print) for name in ASSETS]"

test: setup lint ## linters, types, import rules, then every test
	$(BIN)/pytest -n 2

demo: setup ## train, fold, verify and time a real adapter; the report is in build/demo
	$(BIN)/deployfa demo --out build/demo --force

lint: $(STAMP) ## linters, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# cli/ and models/ install as deployfa.cli and deployfa.models: check the tree in that shape
	@rm -rf $(LINT_TREE) && mkdir -p $(LINT_TREE)
	@cp -pR deployfa cli models $(LINT_TREE)/
	@mv $(LINT_TREE)/cli $(LINT_TREE)/models $(LINT_TREE)/deployfa/
	cd $(LINT_TREE) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml \
		--cache-dir $(CURDIR)/.mypy_cache -p deployfa
	cd $(LINT_TREE) && $(CURDIR)/$(BIN)/lint-imports --config $(CURDIR)/pyproject.toml --no-cache --no-logo

format: $(STAMP) ## put the sources into ruff's form
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

clean: ## remove what was built here; .venv and the cache stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is not Python 3.11 or newer; run: make setup PYTHON=/path/to/python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
			apt-get update -qq && apt-get install -y -qq python3-venv; } || \
		{ echo "error: $(PYTHON) cannot make environments; run: apt-get install python3-venv" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	@touch $@
