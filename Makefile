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
# Installs a lock: with uv, in a quarter of the time, or with pip where uv cannot reach the index.
define install
$(1)/bin/python $(INSTALL) uv
$(1)/bin/python -m uv pip install --quiet --compile-bytecode --requirement $(2) || $(1)/bin/python $(INSTALL) --requirement $(2)
endef
# Tests of one file stay together: they share what is slow to make.
PARALLEL := --numprocesses=auto --maxprocesses=4 --dist=loadfile

.PHONY: book serve test lint unit notebooks-check colab bench notebooks lock adopt clean

book: $(READY)  ## build the book
	$(BIN)/jupyter-book build . -W -n --keep-going -q
	@echo "The book: $(CURDIR)/_build/html/index.html"

serve: book  ## build the book and show it on this machine
	$(BIN)/python -m http.server --directory _build/html --bind 127.0.0.1 8000

test: lint unit notebooks-check  ## every check: style, types, units, properties, doctests, pages, browser, notebooks

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: $(READY)
	$(BIN)/python -m pytest $(PARALLEL)

notebooks-check: $(READY)
	$(BIN)/python -m pytest $(PARALLEL) --nbval notebooks

colab: $(COLAB_READY) $(READY)  ## run every notebook as Colab would
	$(BIN)/python -m tools.colab $(CURDIR)/$(COLAB_VENV)/bin/python $(PARALLEL)

bench: $(READY)  ## measure ratios on this machine, for book/performance
	$(BIN)/python -m tests.benchmarks

notebooks: $(READY)  ## execute the notebooks and store their outputs
	$(BIN)/python -m tools.execute

lock: $(READY)  ## compile the locks from what pyproject.toml declares
	$(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --all-extras --group book --group test --quiet --output-file requirements.txt
	$(BIN)/uv pip compile --group colab --universal --python-version 3.12 --quiet --output-file tools/requirements-colab.txt

adopt: $(READY)  ## make adopt REPO=owner/name: set the repository's address everywhere
	$(BIN)/python -m tools.adopt $(REPO)

clean:
	rm -rf _build build $(VENV) $(COLAB_VENV)

$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and f'Python 3.11 to 3.13 is needed, this is {sys.version.split()[0]}: make PYTHON=python3.12 …')"
	$(PYTHON) -m venv $(VENV)
	$(call install,$(VENV),requirements.txt)
	$(BIN)/python $(INSTALL) --no-deps --editable .
	@touch $@

$(COLAB_READY): tools/requirements-colab.txt
	$(COLAB_PYTHON) -m venv $(COLAB_VENV)
	$(call install,$(COLAB_VENV),tools/requirements-colab.txt)
	@touch $@
