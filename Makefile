# Two commands that do all their own set-up on a machine with Python 3.11 or newer:
#   make quickstart   train a tiny agent to search over several turns, and show what it learned
#   make test         lint, types, tests
# Another Python: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart

.PHONY: quickstart test lint types pytest install-dev clean

quickstart: $(VENV)/installed-plot
	@if [ -e $(RUN) ]; then mv $(RUN) $(RUN)-$$(date +%Y%m%d-%H%M%S); fi
	$(BIN)/agent-r1 train hopworld --run $(RUN)

test: lint types pytest

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-dev
	$(BIN)/mypy

pytest: $(VENV)/installed-dev
	$(BIN)/pytest

install-dev: $(VENV)/installed-dev

$(VENV)/installed-plot: pyproject.toml constraints.txt scripts/install.sh
	scripts/install.sh $(PYTHON) $(VENV) plot
	@touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt scripts/install.sh
	scripts/install.sh $(PYTHON) $(VENV) plot,multihop,dense,parquet,hub,smollm2,gymnasium,mcp,openenv,verifiers,dev
	@touch $@ $(VENV)/installed-plot

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
