# make help lists the targets. Each one first makes what it needs; nothing but Python, a C++ compiler and a package
# index is expected on the machine.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
LIBRARY := fedkseed_kernels/_lib/libfedkseed_cpu.so
INSTALLED := $(VENV)/.installed
CXX_FILES = $(shell find csrc benchmarks tests -name '*.h' -o -name '*.inc' -o -name '*.cpp' -o -name '*.cu')

# Extra arguments of the commands below, e.g. make demo DEMO_ARGS='--quick --seed 1'
DEMO_ARGS ?=
TEST_ARGS ?=
TEST_WORKERS ?= logical
BENCH_ARGS ?=
PTX_ARGS ?=
CHAOS_ARGS ?=

.PHONY: install
install: $(INSTALLED) $(LIBRARY) ## create .venv with this checkout in it, editable, and build the native library (default)

.PHONY: demo
demo: fetch ## tune a pretrained language model on the sentences of four clients
	$(PY) -m fedkseed.cli simulate --data sentiment $(DEMO_ARGS)

# Test processes beside each other, one for each processor; TEST_WORKERS=0 runs them in one process.
PYTEST = $(PY) -m pytest --numprocesses $(TEST_WORKERS) --maxprocesses 8 --dist worksteal

.PHONY: test
test: fetch ## run the fast tests: every test file, a case of each kind
	$(PYTEST) -m 'not slow' $(TEST_ARGS)

.PHONY: test-slow
test-slow: fetch ## run the tests that make test leaves out
	$(PYTEST) -m slow $(TEST_ARGS)

.PHONY: test-all
test-all: test test-slow ## run all tests

.PHONY: ptx
ptx: install ## run the GPU kernels' PTX on an emulator, all cases without a record in benchmarks/results/ptx.json
	PYTHONPATH=tests:. $(PY) -m ptx $(PTX_ARGS)

.PHONY: chaos
chaos: install ## kill server, nodes and workers of a federation, and fedkseed simulate at 60 instants; an hour
	PYTHONPATH=tests:. $(PY) -m support.chaos $(CHAOS_ARGS)

.PHONY: newest
newest: fetch ## run the adapters' tests with the newest releases of the index, in an environment of their own
	$(PY) -m benchmarks.newest

.PHONY: bench
bench: fetch ## run the kernel benchmarks; results go to benchmarks/results
	$(PY) -m benchmarks.machine_code.gate --json benchmarks/results/gate.json
	$(PY) -m benchmarks.kernels $(BENCH_ARGS)

.PHONY: lint
lint: install ## check style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

.PHONY: format
format: install ## lay out all sources
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

.PHONY: wheel
wheel: install ## build a wheel into dist
	rm -rf build/lib* build/bdist.* dist
	$(PY) -m pip wheel --no-deps --wheel-dir dist .

.PHONY: fetch
fetch: install ## fetch the demo's model and data into the cache (FEDKSEED_CACHE)
	$(PY) -m fedkseed.data

.PHONY: clean
clean: ## remove all that was built here (the cache of fetched files stays)
	rm -rf $(VENV) build dist *.egg-info fedkseed_kernels/_lib .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | awk -F '\t' '{ printf "make %-9s %s\n", $$1, $$2 }'

OLDEST := 3.11

$(INSTALLED): pyproject.toml constraints.txt fedkseed_kernels/_version.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < tuple(map(int, "$(OLDEST)".split("."))))' || \
	  { echo "expected Python $(OLDEST) or newer, got $$($(PYTHON) --version 2>&1) ($(PYTHON)); name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# The installation builds the libraries as well; an edit is compiled without it, and only what it touches. Without a
# compiler the library stays away, and the next run tries again.
$(LIBRARY): setup.py $(shell find csrc) | $(INSTALLED)
	$(PY) setup.py build_native --inplace
