# Everything here works from a bare clone with Python and make: each target makes the environment
# that it needs. Another interpreter: make test PYTHON=python3.12 VENV=.venv-3.12

PYTHON ?= python3
VENV ?= .venv
# A file of pip constraints, such as tests/oldest.txt.
CONSTRAINTS ?=
# What the tests have beside the package: with "test" alone, those of optional libraries are skipped.
EXTRAS ?= test,optional
# More words for pytest, such as -x or a file.
PYTEST_ARGS ?=

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

py := $(VENV)/bin/python
stamp := $(VENV)/.stamp

# How long `make stress` goes on.
MINUTES ?= 10

.PHONY: help demo test test-all coverage stress check format bench bench-quick clean

help:
	@echo "make demo | test | test-all | coverage | stress | check | format | bench | bench-quick | clean"

$(stamp)-venv:
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed")'
	@test ! -e $(VENV) || test -e $(stamp) || \
		{ echo "$(VENV) was not made by this Makefile: pass another one, VENV=.venv-here" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	touch $(stamp)
	touch $@

# One stamp per set of extras; a change of what pyproject.toml asks for installs again.
$(stamp)-%: pyproject.toml $(CONSTRAINTS) | $(stamp)-venv
	$(py) -m pip install --quiet --disable-pip-version-check \
		$(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable '.[$*]'
	touch $@

demo: $(stamp)-demo
	$(py) bench/demo.py

test: $(stamp)-$(EXTRAS)
	$(py) -m pytest -m "not thorough" $(PYTEST_ARGS)

# With every product of parameters, and five times as many generated examples. Some tests may take
# fifteen minutes, and faulthandler waits one more.
test-all: $(stamp)-$(EXTRAS)
	$(py) -m pytest --hypothesis-profile=thorough -o faulthandler_timeout=960 $(PYTEST_ARGS)

# The lines and branches that `make test` takes, worker processes included. Those that compiled code
# takes, and those of a worker that is killed, are not seen. Programs that run in other folders write
# to the same file.
coverage: export COVERAGE_FILE := $(CURDIR)/.coverage/data
coverage: $(stamp)-$(EXTRAS),coverage
	$(py) -m coverage erase
	$(py) -m coverage run -m pytest -m "not thorough" $(PYTEST_ARGS)
	$(py) -m coverage combine --quiet
	$(py) -m coverage report

# Random kills, interrupts, full disks and time-outs: make stress MINUTES=2
stress: $(stamp)-$(EXTRAS)
	$(py) -m tests.stress --minutes $(MINUTES) $(STRESS_ARGS)

check: $(stamp)-check
	$(py) -m ruff check .
	$(py) -m ruff format --check .
	$(py) -m mypy

format: $(stamp)-check
	$(py) -m ruff check --fix-only .
	$(py) -m ruff format .

bench: $(stamp)-bench
	$(py) -m bench

bench-quick: $(stamp)-bench
	$(py) -m bench --quick

clean:
	rm -rf .venv .venv-* build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
