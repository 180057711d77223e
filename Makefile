PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install demo test test-slow check format clean

help:
	@echo "make demo       train, monitor, catch a drift, see it in MLflow (about 5 minutes with the installation)"
	@echo "make test       the test suite, README included"
	@echo "make check      lint, format and types"
	@echo "make test-slow  the tests that take minutes"

install: $(INSTALLED)

# The stamp is written last, so an interrupted installation starts again.
$(INSTALLED): pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[all,dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/python examples/digits_demo.py

test: $(INSTALLED)
	$(BIN)/pytest

test-slow: $(INSTALLED)
	$(BIN)/pytest -m slow

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist runs .mypy_cache .pytest_cache .ruff_cache
