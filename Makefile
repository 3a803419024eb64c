# Two commands that do all their own set-up on a machine with Python 3.11 or newer:
#   make quickstart   train a tiny agent to search over several turns, and show what it learned
#   make test         lint, types, tests
# And beside them:
#   make install      the package alone, in .venv
#   make test-integrations   what needs more, which it installs: vLLM, transformers 4, a browser, npm, pipx
#   make docs         the website with the reference, in build/html; a warning is an error
#   make torture      kills, power cuts and inputs that nobody means well; HOURS=8 goes on for so long
#   make bench        this package beside TRL, three times in turn, into benchmarks/results/peers.json; an hour or two
#   make bench-quick  a small part of that, once, its ratios beside those in that file; minutes
# Another Python: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart
HOURS ?= 0

.PHONY: install quickstart test test-integrations torture bench bench-quick lint types docs pytest web install-dev clean

install: $(VENV)/installed-plot

quickstart: $(VENV)/installed-plot
	@if [ -e $(RUN) ]; then mv $(RUN) $(RUN)-$$(date +%Y%m%d-%H%M%S); fi
	$(BIN)/agent-r1 train hopworld --run $(RUN)

test: lint types docs pytest

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-dev
	$(BIN)/mypy

docs: $(VENV)/installed-dev
	$(BIN)/python -m sphinx -W --keep-going -q -c docs -d build/doctrees . build/html
	@cp build/html/README.html build/html/index.html

# A file of tests to each core. OpenMP's threads sleep while they wait, or they would take one another's core.
pytest: $(VENV)/installed-dev
	OMP_WAIT_POLICY=passive $(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile

test-integrations: $(VENV)/installed-dev $(VENV)-transformers4/installed $(VENV)/installed-integrations
	$(BIN)/agent-r1 engine install vllm --cpu
	AGENT_R1_TRANSFORMERS4=$(CURDIR)/$(VENV)-transformers4/bin/python $(BIN)/pytest -m integration

torture: $(VENV)/installed-dev
	$(BIN)/python -m torture --hours $(HOURS)

bench: $(VENV)/installed-dev $(VENV)-trl/installed
	$(BIN)/python benchmarks/peers/compare.py --trl-venv $(VENV)-trl

bench-quick: $(VENV)/installed-dev $(VENV)-trl/installed
	$(BIN)/python benchmarks/peers/compare.py --trl-venv $(VENV)-trl --quick

# The versions that both environments have are the same: the comparison is of TRL, not of torch.
$(VENV)-trl/installed: constraints.txt
	$(PYTHON) -m venv $(VENV)-trl
	$(VENV)-trl/bin/pip install -q -c constraints.txt "torch==2.13.0" "trl==1.16.0"
	@touch $@

$(VENV)-transformers4/installed:
	$(PYTHON) -m venv $(VENV)-transformers4
	$(VENV)-transformers4/bin/pip install -q "torch==2.13.0" "transformers==4.57.3"
	@touch $@

# A browser and npm are the system's; as root on Debian or Ubuntu they are installed.
$(VENV)/installed-integrations: $(VENV)/installed-dev
	$(BIN)/pip install -q -c constraints.txt ipykernel nbclient nbformat pipx playwright twine
	@missing=; \
	command -v chromium || command -v chromium-browser || command -v google-chrome || missing=chromium; \
	command -v npm || missing="$$missing npm"; \
	[ -z "$$missing" ] || { apt-get update -q && apt-get install -yq $$missing; } || \
	    { echo "install Chromium and npm, then repeat"; exit 1; }
	@touch $@

# The page of agent-r1 view, from its source in web/ to the files in the package.
web:
	cd web && npm ci --no-audit --no-fund && npm run build

install-dev: $(VENV)/installed-dev

$(VENV)/installed-plot: pyproject.toml constraints.txt scripts/install.sh
	scripts/install.sh $(PYTHON) $(VENV) plot
	@touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt scripts/install.sh
	scripts/install.sh $(PYTHON) $(VENV) plot,multihop,dense,parquet,hub,smollm2,gymnasium,mcp,openenv,verifiers,tensorboard,wandb,mlflow,trackio,agents,docs,dev
	@touch $@ $(VENV)/installed-plot

clean:
	rm -rf $(VENV) $(VENV)-transformers4 $(VENV)-trl build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
