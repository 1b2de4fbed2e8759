# make demo   sets up .venv, then runs every stage on the photographs of the package
# make test   sets up .venv, then runs the default test suite
PYTHON ?= $(shell for candidate in python3 python3.12 python3.11 python3.13; do \
	$$candidate -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$candidate && break; done)
VENV := .venv
INSTALLED := $(VENV)/.installed
PYTEST = $(VENV)/bin/python -m pytest
# A test that fails fails the target, although its output goes through sed.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c

.PHONY: setup demo test test-all test-ray test-unit test-train test-others check docs clean

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "sdxl-ray needs Python 3.11, 3.12 or 3.13: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(INSTALLED)
	$(VENV)/bin/sdxl-ray demo

test: $(INSTALLED)
	$(MAKE) --no-print-directory --keep-going test-ray test-unit

test-all: $(INSTALLED)
	$(MAKE) --no-print-directory --keep-going test-ray test-unit PYTEST='$(PYTEST) -m "not gpu"'

test-ray: $(INSTALLED)
	$(PYTEST) tests/integration tests/gpu

# Two processes side by side, since each test keeps to one core.
test-unit: $(INSTALLED)
	$(MAKE) --no-print-directory --jobs=2 --keep-going test-train test-others

TRAIN = tests/unit/train
OTHERS = $(filter-out $(TRAIN) tests/unit/__init__.py tests/unit/__pycache__, $(wildcard tests/unit/*))

test-train: $(INSTALLED)
	$(PYTEST) $(TRAIN) | sed -u 's/^/train  | /'

test-others: $(INSTALLED)
	$(PYTEST) $(OTHERS) | sed -u 's/^/others | /'

check: $(INSTALLED)
	scripts/check

docs: $(INSTALLED)
	$(VENV)/bin/python scripts/make_docs.py
	$(VENV)/bin/python scripts/draw_lr_schedules.py

clean:
	rm -rf $(VENV) build dist *.egg-info
