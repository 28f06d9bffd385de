PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help book test

help:
	@echo "make book   run the experiment notebook, build the book into _build/html"
	@echo "make test   run every test, then every notebook"

# The stamp is written last: an interrupted install leaves none, and the next call starts the environment afresh.
$(VENV)/installed: pyproject.toml
	test -f $@ || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[all]"
	touch $@
