# make demo   sets up .venv, then runs every stage on the photographs of the package
# make test   sets up .venv, then runs the default test suite
PYTHON ?= $(shell for candidate in python3 python3.12 python3.11 python3.13; do \
	$$candidate -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$candidate && break; done)
VENV := .venv
# One process for the tests with Ray, which mostly wait for its processes, and one for the others: tests/conftest.py.
TWO_AT_ONCE := -n 2 --dist loadgroup
INSTALLED := $(VENV)/.installed

.PHONY: setup demo test test-all check docs clean

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "sdxl-ray needs Python 3.11, 3.12 or 3.13: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(INSTALLED)
	$(VENV)/bin/sdxl-ray demo

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest $(TWO_AT_ONCE)

test-all: $(INSTALLED)
	$(VENV)/bin/python -m pytest $(TWO_AT_ONCE) -m "not gpu"

check: $(INSTALLED)
	scripts/check

docs: $(INSTALLED)
	$(VENV)/bin/python scripts/make_docs.py
	$(VENV)/bin/python scripts/draw_lr_schedules.py

clean:
	rm -rf $(VENV) build dist *.egg-info
