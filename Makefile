# Two commands do everything on a fresh machine: `make demo` (the main job) and `make test`.
# Each sets up .venv by itself when pyproject.toml or this file is newer than the last set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo lint lint-python lint-types lint-cuda test test-seeds wheel wheel-cubins clean

demo: $(STAMP)
	$(BIN)/hopper-moe demo

# The `pytest` script, not `python -m pytest`: the latter puts this folder first on the path, where our `kernels`
# folder would stand in for the third-party package of that name. Two files at a time; one where GPU tests run, some of which time.
TEST_WORKERS ?= $(if $(wildcard /dev/nvidia0),0,2)
test: $(STAMP)
	$(BIN)/pytest --numprocesses $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

# Layout, simple mistakes and types; the versions are pinned in pyproject.toml.
CUDA_SOURCES = $(shell git ls-files '*.cu' '*.cuh' '*.cpp' '*.hpp' '*.h')
lint: lint-python lint-types lint-cuda

lint-python: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint-types: $(STAMP)
	$(BIN)/mypy

lint-cuda: $(STAMP)
	$(BIN)/clang-format --dry-run -Werror $(CUDA_SOURCES)

# The plain wheel is pure Python and compiles the kernels at first use. The other carries them compiled: it serves without nvcc.
PREBUILT := kernels/prebuilt
wheel: $(STAMP)
	rm -rf $(PREBUILT) build
	$(BIN)/python -m build --wheel --no-isolation --outdir dist

wheel-cubins: $(STAMP)
	rm -rf $(PREBUILT) build
	$(BIN)/hopper-moe kernels build --into $(PREBUILT)
	$(BIN)/python -m build --wheel --no-isolation --outdir dist
	rm -rf $(PREBUILT) build
# Every randomised CPU test with SEEDS seeds, from a fresh one or from FIRST_SEED, two seeds at a time: one or two minutes a seed, so
# not part of CI. Tests that take long draw fewer cases with each seed: tests/many_seeds.py and its two markers say which. A run
# that was stopped goes on from the last seed that it names.
SEEDS ?= 200
test-seeds: $(STAMP)
	$(BIN)/pytest --quiet --numprocesses 2 --dist loadgroup --seeds $(SEEDS) $(if $(FIRST_SEED),--first-seed $(FIRST_SEED))

setup: $(STAMP)

$(STAMP): pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --python $(BIN)/python -e '.[sglang,host,eval,test,lint]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
