# `make demo` and `make test` need Python 3.10+, a C++17 compiler and make; everything else is installed in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py constraints.txt MANIFEST.in README.md \
	$(shell find csrc kernels nabla_tau -type f -not -name '*.so' -not -name '*.pyc')

.PHONY: demo test lint docs bench sanitize clean

demo: $(VENV)/cli
	$(BIN)/nabla-tau demo --out demo

test: $(VENV)/dev lint sanitize
	$(BIN)/pytest

# On the installed package, from a folder without sources: what users get is what is checked.
lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/lint
	cd build/lint && ../../$(BIN)/lint-imports --config ../../pyproject.toml
	cd build/lint && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p nabla_tau

# A site in build/site; a broken link is an error.
docs: $(VENV)/dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

bench: $(VENV)/dev
	OMP_WAIT_POLICY=passive $(BIN)/pytest -q benchmarks --benchmark-only --benchmark-max-time=0.3 \
		--benchmark-columns=min,median,iqr,rounds
	$(BIN)/python benchmarks/run.py rows --quick
	$(BIN)/python benchmarks/run.py linear_rows --quick

# The kernels without Python, and random jobs for the statistics, under AddressSanitizer and
# UndefinedBehaviorSanitizer, and their threads under ThreadSanitizer. Needs g++ only; -j2 builds both at once.
# More random jobs: build/sanitize-address,undefined FIRST ROUNDS
sanitize: build/sanitize-address,undefined build/sanitize-thread
	for program in $^; do ./$$program || exit 1; done

build/sanitize-%: $(wildcard tests/cpp/*) $(wildcard csrc/*)
	mkdir -p build
	$(CXX) -std=c++17 -O1 -g -fwrapv -Wall -Wextra -Wno-unknown-pragmas -DNABLA_TAU_BASELINE -DNABLA_TAU_STD_THREADS \
		-fsanitize=$* -fno-sanitize-recover=all -pthread $(filter-out csrc/bind%,$(filter %.cpp,$^)) -o $@

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
