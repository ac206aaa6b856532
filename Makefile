# From nothing to the book and its checks. Needs Python 3.11–3.13, make and git; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
COLAB_VENV := .venv-colab
COLAB_READY := $(COLAB_VENV)/.ready
# Colab's pinnable runtime has Python 3.12: use it where the machine has one.
COLAB_PYTHON ?= $(firstword $(foreach name,python3.12 $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python3.12),$(shell $(name) -c "print('$(name)')" 2>/dev/null)) $(PYTHON))
INSTALL := -m pip install --quiet --disable-pip-version-check
# Installs a lock: with uv, in a quarter of the time, or with pip where uv cannot reach the index. Both check its hashes.
define install
$(1)/bin/python $(INSTALL) --requirement tools/requirements-uv.txt
$(1)/bin/python -m uv pip install --quiet --compile-bytecode --require-hashes --requirement $(2) || $(1)/bin/python $(INSTALL) --require-hashes --requirement $(2)
endef
# One process more than there are cores, of two to four: tests that start processes wait for them. The longest files
# come first (tools/schedule.py), and who has nothing left takes over from who has.
PARALLEL := --numprocesses=$(shell python3 -c "import os; print(min(4, max(2, (os.cpu_count() or 1) + 1)))" 2>/dev/null || echo 2) --dist=worksteal
FOR ?=

.PHONY: book pdf serve check core test test-all lint javascript unit units browser package notebooks-changed notebooks-check colab bench mutants notebooks lock adopt clean

book: $(READY)  ## build the book
	$(BIN)/python -m tools.book -W -n --keep-going -q
	@echo "The book: $(CURDIR)/_build/html/index.html"

pdf: book browser  ## the book as one file with an outline
	$(BIN)/python -m tools.pdf

serve: book  ## build the book and show it on this machine
	$(BIN)/python -m http.server --directory _build/html --bind 127.0.0.1 8000

check: $(READY)  ## before a commit: style, types, the quick core; FOR=changed, or FOR=companion/oracle.py: and in full what concerns it
	@$(MAKE) --no-print-directory --jobs=2 lint core FOR="$(FOR)"

core: $(READY)
	@$(BIN)/python -m tools.changed check $(FOR)

test: browser lint unit notebooks-changed  ## every check: style, types, units, properties, doctests, pages, browser, notebooks that changed

test-all: SLOW := --slow
test-all: browser lint unit notebooks-check colab  ## whole matrices, a thousand random examples, every notebook under both locks

lint: $(READY) javascript
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

javascript: $(READY)  # style of the pages' JavaScript, where npm is; in CI it must be
	@if command -v npm > /dev/null; then \
	  mkdir -p $(VENV)/javascript && cp tools/package.json tools/package-lock.json $(VENV)/javascript/ && \
	  npm ci --prefix $(VENV)/javascript --ignore-scripts --no-audit --no-fund --silent && \
	  $(VENV)/javascript/node_modules/.bin/biome ci --config-path=tools/biome.json book/_static; \
	elif [ "$$CI" = true ]; then echo "npm is needed to check the JavaScript"; exit 1; \
	else echo "No npm: the JavaScript's style is NOT checked."; fi

unit: $(READY)
	$(BIN)/python -m pytest $(PARALLEL) $(SLOW)

units: $(READY)  ## the units alone; VERSIONS="keras==3.13.2 …": with these versions instead of the lock's
	$(if $(strip $(VERSIONS)),$(BIN)/uv pip install --quiet --python $(BIN)/python $(VERSIONS))
	$(BIN)/python -m pytest $(PARALLEL) companion tests/kit tests/test_*.py

browser: $(READY)  # finds a browser for the tests of the pages, or gets one, or says how
	@$(BIN)/python -m tools.browser

notebooks-changed: $(READY)
	$(BIN)/python -m tools.changed notebooks $(PARALLEL)

notebooks-check: $(READY)  ## execute every notebook and compare it with what it has stored
	$(BIN)/python -m pytest $(PARALLEL) --dist=loadfile --nbval notebooks

colab: $(COLAB_READY) $(READY)  ## run every notebook as Colab would
	$(BIN)/python -m tools.colab $(CURDIR)/$(COLAB_VENV)/bin/python $(PARALLEL) --dist=loadfile

bench: $(READY)  ## measure ratios on this machine, for book/performance
	$(BIN)/python -m tests.benchmarks

mutants: $(READY)  ## break the package in many small ways, and list what no test notices; ROOM=oracle: one file
	$(BIN)/python -m tools.mutants $(ROOM)

notebooks: $(READY)  ## execute the notebooks and store their outputs
	$(BIN)/python -m tools.execute

lock: $(READY)  ## compile the locks from what pyproject.toml declares
	$(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --all-extras --group book --group test --generate-hashes --quiet --output-file requirements.txt
	$(BIN)/uv pip compile --group colab --universal --python-version 3.12 --generate-hashes --quiet --output-file tools/requirements-colab.txt
	$(BIN)/uv pip compile --group uv --universal --python-version 3.11 --generate-hashes --quiet --output-file tools/requirements-uv.txt

package: $(READY)  ## build the package into dist
	$(BIN)/uv build --quiet --out-dir dist

adopt: $(READY)  ## make adopt REPO=owner/name: set the repository's address everywhere
	$(BIN)/python -m tools.adopt $(REPO)

clean:
	rm -rf _build build dist $(VENV) $(COLAB_VENV)

$(READY): requirements.txt tools/requirements-uv.txt pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and f'Python 3.11 to 3.13 is needed, this is {sys.version.split()[0]}: make PYTHON=python3.12 …')"
	$(PYTHON) -m venv $(VENV)
	$(call install,$(VENV),requirements.txt)
	$(BIN)/python $(INSTALL) --no-deps --editable .
	@touch $@

$(COLAB_READY): tools/requirements-colab.txt tools/requirements-uv.txt
	$(COLAB_PYTHON) -m venv $(COLAB_VENV)
	$(call install,$(COLAB_VENV),tools/requirements-colab.txt)
	@touch $@
