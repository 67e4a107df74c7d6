# `make demo` and `make test` need Python 3.10+, a C++17 compiler and make; everything else is installed in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py constraints.txt MANIFEST.in README.md \
	$(shell find csrc kernels nabla_tau -type f -not -name '*.so' -not -name '*.pyc')

.PHONY: demo test lint bench clean

demo: $(VENV)/cli
	$(BIN)/nabla-tau demo --out demo

test: $(VENV)/dev lint
	$(BIN)/pytest

# On the installed package, from a folder without sources: what users get is what is checked.
lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/lint
	cd build/lint && ../../$(BIN)/lint-imports --config ../../pyproject.toml
	cd build/lint && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p nabla_tau

bench: $(VENV)/dev
	$(BIN)/python benchmarks/run.py rows --quick

$(VENV)/pip:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

# Two stamps, since the demo needs no linters; each installs the package anew when a source has changed.
$(VENV)/cli: $(VENV)/pip $(SOURCES)
	$(BIN)/python -m pip install --quiet -c constraints.txt '.[cli]'
	touch $@

$(VENV)/dev: $(VENV)/pip $(SOURCES)
	$(BIN)/python -m pip install --quiet -c constraints.txt '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps plotnine  # for its diamonds.csv (examples/tabular.py)
	touch $@ $(VENV)/cli

clean:
	rm -rf $(VENV) build dist demo *.egg-info
