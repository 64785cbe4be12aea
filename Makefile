# `make` alone lists the targets. Override with e.g. `make train ARGS="--train.epochs 5"` or `make setup PYTHON=python3.12`.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup train test soak lint typecheck bench gpu clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## */\1\t/' | expand -t 12

setup: $(INSTALLED)  ## make .venv and install everything

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"FastGeSSL needs Python 3.11 or newer, found {sys.version.split()[0]}. Run make PYTHON=python3.11.")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[train,dev]'
	touch $@

train: $(INSTALLED)  ## train GeSSL over SimCLR on handwritten digits and evaluate it
	$(RUN) -m fastgessl train digits-simclr-gessl $(ARGS)

# One thread a worker: two workers on two cores would otherwise fight over them.
test: $(INSTALLED)  ## run the whole test suite
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 $(ARGS)

soak: $(INSTALLED)  ## run the slow tests
	$(RUN) -m pytest -m slow $(ARGS)

lint: $(INSTALLED)  ## ruff: style and formatting
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

typecheck: $(INSTALLED)  ## mypy
	$(VENV)/bin/mypy

bench: $(INSTALLED)  ## benchmarks of this machine, written to bench/results/
	$(RUN) -m bench $(ARGS)

gpu: $(INSTALLED)  ## everything a GPU can tell, written to bench/results/
	$(RUN) -m bench.gpu $(ARGS)

clean:  ## remove the virtual environment, caches and builds (runs/ stays)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
