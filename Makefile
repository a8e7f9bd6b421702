# `make` lists the targets. Everything runs in .venv, which the first target creates: `make book`
# installs what the site needs; the first other target adds the rest of the lock. Notebooks and tests
# run two at a time (JOBS=...).

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
RUN := $(BIN)/python
INSTALL := $(RUN) book/_tools/install.py
SITE := $(VENV)/.site
INSTALLED := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help book test check format notebooks elsewhere verdicts record full pdf lighthouse serve stills bench lock address clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /  make \1\t/' | expand -t 20

$(SITE): requirements-site.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "This book needs Python 3.11 or newer, and %s is %d.%d: run make PYTHON=/path/to/python3.11" % (sys.executable, v[0], v[1]))'
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(INSTALL) requirements-site.lock
	@touch $(SITE)

$(INSTALLED): requirements.lock pyproject.toml | $(SITE)
	$(INSTALL) requirements.lock --project
	@touch $(INSTALLED)

book: $(SITE) ## install what is missing, build the site, print the address of its first page
	@$(RUN) book/_tools/build.py

test: $(INSTALLED) book ## everything that CI runs: style, unit tests, notebooks, site
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(RUN) -m pytest -n $(JOBS) --dist loadgroup

check: $(INSTALLED) ## format, lint, types, fast unit tests: under a minute
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(RUN) -m pytest -q -n $(JOBS) -m "not slow and not notebooks and not site"

format: $(INSTALLED) ## format the code of the package, the tests and the notebooks
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(RUN) book/_tools/style.py $(NAMES)

notebooks: $(INSTALLED) ## execute what changed, pair, stamp (FORCE=1: all; NAMES="properties evidence/properties": some)
	$(RUN) book/_tools/notebooks.py --jobs $(JOBS) $(if $(FORCE),--force) $(NAMES)

elsewhere: $(INSTALLED) ## run the notebooks as on another processor, storing nothing (NAMES=...: some)
	$(RUN) book/_tools/notebooks.py --jobs $(JOBS) --elsewhere $(NAMES)

verdicts: $(INSTALLED) ## judge the claims again from other seeds and as elsewhere (FORCE=1, NAMES=...)
	$(RUN) book/_tools/replications.py --jobs $(JOBS) $(if $(FORCE),--force) $(NAMES)

record: $(INSTALLED) ## like notebooks, and write the measured verdicts into the ledger
	$(RUN) book/_tools/notebooks.py --jobs $(JOBS) --record $(NAMES)

full: $(INSTALLED) ## compute what is missing or stale of book/results (NAMES=...: these)
	$(RUN) book/_tools/experiments.py $(NAMES)

pdf: $(INSTALLED) book ## print the whole book as one PDF, _build/html/relubook.pdf (needs Chromium)
	$(RUN) book/_tools/pdf.py

lighthouse: $(INSTALLED) book ## measure the site (needs Chromium, Node 18, npm and a quiet machine)
	$(RUN) book/_tools/lighthouse.py $(NAMES)

serve: $(SITE) ## build, serve on loopback and rebuild on change
	$(RUN) book/_tools/build.py --serve

stills: $(INSTALLED) ## draw anew what moving figures show without a script, and the card of the book
	$(RUN) book/_tools/explorables.py
	$(RUN) book/_tools/card.py

bench: $(INSTALLED) ## a table of ratios with their bars, and _build/bench.json
	$(RUN) -m benchmarks $(NAMES)

lock: $(INSTALLED) ## resolve requirements.lock and environment.yml anew
	$(RUN) book/_tools/lock.py

address: $(INSTALLED) ## change the repository's address everywhere: make address URL=https://...
	$(RUN) book/_tools/address.py $(URL)

clean: ## remove what the build made (the environment stays)
	$(PYTHON) -c "import shutil; shutil.rmtree('_build', ignore_errors=True)"
