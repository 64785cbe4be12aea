# `make` alone lists the targets. Override with e.g. `make train ARGS="--train.epochs 5"` or `make setup PYTHON=python3.12`.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.6.0
TRITON ?= 3.2.0
ARGS ?=
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup train test soak versions lint typecheck bench gpu clean

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

soak: $(INSTALLED)  ## run the slow tests, and every method on digits over five seeds
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m slow -s $(ARGS)
	$(RUN) -m bench.studies.methods

# numpy: the interpreter of triton before 3.7 needs one below 2.4.
versions:  ## run the kernel tests with TORCH=2.6.0 TRITON=3.2.0, the oldest that work, or others, in an environment of their own
	$(PYTHON) -m venv $(VENV)/torch-$(TORCH)
	$(VENV)/torch-$(TORCH)/bin/pip install --quiet --disable-pip-version-check torch==$(TORCH) triton==$(TRITON) 'numpy<2.4' setuptools pytest hypothesis
	OMP_NUM_THREADS=1 $(VENV)/torch-$(TORCH)/bin/python -m pytest -p no:cacheprovider tests/kernels $(ARGS)

lint: $(INSTALLED)  ## ruff: style and formatting
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

typecheck: $(INSTALLED)  ## mypy
	$(VENV)/bin/mypy

bench: $(INSTALLED)  ## benchmarks of this machine, written to bench/results/
	OMP_NUM_THREADS=1 $(RUN) -m pytest bench --benchmark-only $(ARGS)

gpu: $(INSTALLED)  ## what a GPU should run, written to bench/results/
	$(RUN) -m bench.gpu $(ARGS)

clean:  ## remove the virtual environment, caches and builds (runs/ stays)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
