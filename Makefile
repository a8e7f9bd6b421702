# `make` lists the targets. Everything runs in .venv, which the first target creates from the lock.

PYTHON ?= python3
VENV := .venv
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
RUN := $(BIN)/python
INSTALLED := $(VENV)/.installed
SITE := _build/html
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help book test check format notebooks elsewhere record full serve bench lock address clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /  make \1\t/' | expand -t 20

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "This book needs Python 3.11 or newer, and %s is %d.%d: run make PYTHON=/path/to/python3.11" % (sys.executable, v[0], v[1]))'
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --requirement requirements.lock
	$(RUN) -m pip install --quiet --no-deps --editable .
	@touch $(INSTALLED)

book: $(INSTALLED) ## install what is missing, build the site, print the address of its first page
	@$(RUN) book/_tools/build.py

test: book ## everything that CI runs: style, unit tests, chapters, site
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(RUN) -m pytest

check: $(INSTALLED) ## format, lint, types, fast unit tests: under a minute
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(RUN) -m pytest -q -n 2 -m "not slow and not notebooks and not site"

format: $(INSTALLED) ## format the code of the package, the tests and the chapters
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(RUN) book/_tools/style.py

notebooks: $(INSTALLED) ## execute what changed, pair, stamp (FORCE=1: all; NAMES="properties ...": some)
	$(RUN) book/_tools/notebooks.py $(if $(FORCE),--force) $(NAMES)

elsewhere: $(INSTALLED) ## run the chapters as on another processor, storing nothing (NAMES=...: some)
	$(RUN) book/_tools/notebooks.py --elsewhere $(NAMES)

record: $(INSTALLED) ## like notebooks, and write the measured verdicts into the ledger
	$(RUN) book/_tools/notebooks.py --record $(NAMES)

full: $(INSTALLED) ## compute the stored results of book/results (NAMES=...: some)
	RELUBOOK_SCALE=full $(RUN) -m relubook.evidence.results $(NAMES)

serve: $(INSTALLED) ## build, serve on loopback and rebuild on change
	$(RUN) book/_tools/build.py --serve

bench: $(INSTALLED) ## a table of ratios with their bars, and _build/bench.json
	$(RUN) -m benchmarks $(NAMES)

lock: $(INSTALLED) ## resolve requirements.lock and environment.yml anew
	$(RUN) book/_tools/lock.py

address: $(INSTALLED) ## change the repository's address everywhere: make address URL=https://...
	$(RUN) book/_tools/address.py $(URL)

clean: ## remove what the build made (the environment stays)
	$(PYTHON) -c "import shutil; shutil.rmtree('_build', ignore_errors=True)"
