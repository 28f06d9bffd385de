PYTHON ?= python3
# the lowest versions have wheels for the lowest Python
PYTHON_LOWEST ?= $(or $(shell command -v python3.11),$(PYTHON))
VENV := .venv
BIN := $(VENV)/bin
# an experiment: papermill executes book/experiments/NAME.ipynb into _build/experiments, results file beside it
EXPERIMENTS := $(patsubst book/experiments/%.ipynb,%,$(wildcard book/experiments/*.ipynb))
# chapters that the lowest versions run: pictures, statistics, solvers and training, in under a minute
QUICK := book/nuclear_norm.ipynb book/fno.ipynb
PIP := python -m pip install --quiet --disable-pip-version-check
UNIT := -m pytest -q -n 2 --dist worksteal tests
NOTEBOOKS := -m pytest -q -n 2 --dist loadfile --nbval-lax --nbval-cell-timeout=900

# A stage says where the work is; a command ends by saying how long it took, whether it failed or not.
TIMED = @start=$$(date +%s); $(MAKE) --no-print-directory $(1); code=$$?; \
  took=$$(($$(date +%s) - start)); word=done; test $$code = 0 || word=FAILED; \
  printf '\n== %s: %s after %d min %02d s\n' '$@' $$word $$((took / 60)) $$((took % 60)); exit $$code

.DEFAULT_GOAL := help
.PHONY: help digits book test test-lowest experiments bench lint types
.PHONY: digits-steps book-steps test-steps test-lowest-steps experiments-steps

help:
	@echo "make digits       the shortest way to a picture: a small environment, one experiment"
	@echo "make book         run the digits experiment, then build the book into _build/html"
	@echo "make test         run every test, then every notebook"
	@echo "make test-lowest  run the unit tests and two notebooks with the lowest versions allowed (Python 3.11)"
	@echo "make lint, types  look at the source only"
	@echo "make experiments  run every experiment notebook and keep the executed copies and results"
	@echo "make bench        measure cvxlib beside its competitors (hours; on an otherwise idle machine)"

digits book test test-lowest experiments:
	$(call TIMED,$@-steps)

# Each environment's stamp is written last: an interrupted install leaves none, and the next call starts it afresh.
$(VENV)/installed: pyproject.toml constraints-book.txt
	@printf '\n== install: everything, into $(VENV)\n'
	test -f $@ || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/$(PIP) --constraint constraints-book.txt --editable ".[all]"
	touch $@

.venv-digits/installed: pyproject.toml
	@printf '\n== install: what the experiment needs, into .venv-digits\n'
	test -f $@ || $(PYTHON) -m venv --clear .venv-digits
	.venv-digits/bin/$(PIP) --editable ".[figures,notebooks]"
	touch $@

.venv-lowest/installed: pyproject.toml constraints-lowest.txt
	@printf '\n== install: the lowest versions, into .venv-lowest\n'
	test -f $@ || '$(PYTHON_LOWEST)' -m venv --clear .venv-lowest
	.venv-lowest/bin/$(PIP) --constraint constraints-lowest.txt \
	  --editable ".[reference,estimators,vision,text,figures,notebooks,tests,benchmarks]"
	touch $@

_build/experiments/%.ipynb: book/experiments/%.ipynb $(VENV)/installed
	@printf '\n== experiment: $<\n'
	mkdir -p _build/experiments
	$(BIN)/papermill --cwd book/experiments --progress-bar $< $@

digits-steps: .venv-digits/installed
	@printf '\n== experiment: book/experiments/digits.ipynb\n'
	mkdir -p _build/experiments
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} .venv-digits/bin/papermill --cwd book/experiments --progress-bar book/experiments/digits.ipynb _build/experiments/digits.ipynb
	@echo "Look at _build/experiments/digits.png (numbers: digits.json, the executed notebook: digits.ipynb, beside it)"

book-steps: $(VENV)/installed
	$(MAKE) --no-print-directory --always-make --assume-old=$(VENV)/installed _build/experiments/digits.ipynb
	@printf '\n== pages: every chapter is executed, then built\n'
	$(BIN)/jupyter-book build --all -W --keep-going .
	@echo "Open _build/html/index.html (the fresh run of the experiment is _build/experiments/digits.ipynb)"

test-steps: $(VENV)/installed
	@printf '\n== unit tests\n'
	OMP_NUM_THREADS=1 $(BIN)/python $(UNIT)
	@printf '\n== notebooks\n'
	OMP_NUM_THREADS=1 $(BIN)/python $(NOTEBOOKS) book

test-lowest-steps: .venv-lowest/installed
	@.venv-lowest/bin/python -m cvxlib.versions
	@printf '\n== unit tests, lowest versions\n'
	OMP_NUM_THREADS=1 .venv-lowest/bin/python $(UNIT)
	@printf '\n== notebooks, lowest versions: $(QUICK)\n'
	OMP_NUM_THREADS=1 .venv-lowest/bin/python $(NOTEBOOKS) $(QUICK)

experiments-steps: $(VENV)/installed
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

types: $(VENV)/installed
	$(BIN)/mypy
