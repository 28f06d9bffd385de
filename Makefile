PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# an experiment: papermill executes book/experiments/NAME.ipynb into _build/experiments, results file beside it
EXPERIMENTS := $(patsubst book/experiments/%.ipynb,%,$(wildcard book/experiments/*.ipynb))

.DEFAULT_GOAL := help
.PHONY: help book test experiments bench lint

help:
	@echo "make book         run the digits experiment, then build the book into _build/html"
	@echo "make test         run every test, then every notebook"
	@echo "make experiments  run every experiment notebook and keep the executed copies and results"
	@echo "make bench        measure cvxlib beside its competitors (hours; on an otherwise idle machine)"

# The stamp is written last: an interrupted install leaves none, and the next call starts the environment afresh.
$(VENV)/installed: pyproject.toml
	test -f $@ || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[all]"
	touch $@

_build/experiments/%.ipynb: book/experiments/%.ipynb $(VENV)/installed
	mkdir -p _build/experiments
	$(BIN)/papermill --cwd book/experiments --progress-bar $< $@

book: $(VENV)/installed
	$(MAKE) --no-print-directory --always-make --assume-old=$(VENV)/installed _build/experiments/digits.ipynb
	$(BIN)/jupyter-book build --all -W --keep-going .
	@echo "Open _build/html/index.html (the fresh run of the experiment is _build/experiments/digits.ipynb)"

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --nbval-lax --nbval-cell-timeout=900 book

experiments: $(VENV)/installed
	for name in $(EXPERIMENTS); do \
	  $(MAKE) --no-print-directory --always-make --assume-old=$(VENV)/installed _build/experiments/$$name.ipynb || exit 1; \
	  mkdir -p book/experiments/results; \
	  cp _build/experiments/$$name.ipynb book/experiments/; \
	  cp _build/experiments/$$name.json book/experiments/results/; \
	  if test -f _build/experiments/$$name.png; then cp _build/experiments/$$name.png book/experiments/results/; fi; \
	done

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
