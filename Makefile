# Two commands do everything on a fresh machine: `make demo` (the main job) and `make test`.
# Each sets up .venv by itself when pyproject.toml or this file is newer than the last set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo test clean

demo: $(STAMP)
	$(BIN)/hopper-moe demo

# The `pytest` script, not `python -m pytest`: the latter puts this folder first on the path, where our `kernels`
# folder would stand in for the third-party package of that name. Two files at a time; one where GPU tests run, some of which time.
TEST_WORKERS ?= $(if $(wildcard /dev/nvidia0),0,2)
test: $(STAMP)
	$(BIN)/pytest --numprocesses $(TEST_WORKERS) --dist loadfile

setup: $(STAMP)

$(STAMP): pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --python $(BIN)/python -e '.[sglang,host,eval,test]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
