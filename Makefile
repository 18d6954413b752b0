# What people do often. A fresh machine needs Python 3.10 or newer and make; everything else goes into .venv.
#
#   make verify     LoRA learns the shifted digits, then the document's claims are judged by numbers
#   make test       the test suite, on all processors
#   make oracles    the comparisons with PyTorch and PEFT, which are installed for it (about 1 GB)
#   make lint       ruff: lint and format, nothing is changed
#   make format     ruff: mend what can be mended
#   make bench      one training step beside PyTorch's and HIPS autograd's, as ratios (installs both)
#   make figures    draw the figures again, into figures/
#   make notebooks  run every notebook from top to bottom and check what comes out; nothing is kept
#   make exercises  the students' version of the exercises, into build/exercises/
#   make clean      remove .venv and the caches
#
# Another Python: make test PYTHON=python3.13 (a .venv of another Python is made anew).

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: help verify test oracles lint format bench figures notebooks exercises clean

help:
	@sed -n 's/^#   //p' Makefile

# A Python asked for by name replaces a .venv that was made by another one.
ifneq ($(filter command environment,$(origin PYTHON)),)
VERSION = import sys; print(sys.version)
ifneq ($(shell $(PYTHON) -c "$(VERSION)"),$(shell test -x $(BIN)/python && $(BIN)/python -c "$(VERSION)"))
$(shell rm -f $(VENV)/.base)
endif
endif

# Stamps: what is installed already is not installed again until pyproject.toml changes.
$(VENV)/.base: pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.%: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	@touch $@

verify: $(VENV)/.base
	$(BIN)/minipeft train --model vit --method lora
	$(BIN)/minipeft verify

# The tests' matrices are small: threads would only wait for each other, for minutes where other programs run.
test oracles notebooks: export OPENBLAS_NUM_THREADS ?= 1

test: $(VENV)/.test
	$(BIN)/python -m pytest --ignore=tests/oracles -n auto --dist loadfile

oracles: $(VENV)/.test $(VENV)/.oracles
	$(BIN)/python -m pytest tests/oracles -n auto --dist loadfile

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/mlp_step.py

figures: $(VENV)/.base
	$(BIN)/minipeft figures

notebooks: $(VENV)/.test
	$(BIN)/python -m pytest tests/test_notebooks.py -m notebooks -n auto

exercises: $(VENV)/.test
	$(BIN)/python notebooks/exercises/make_student.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
