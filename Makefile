# make train | test | lint | docs | setup | clean | help
#
# PYTHON makes the virtual environment, PIP_ARGS goes to pip, ARGS to `kfac-dist train`, PYTEST_ARGS to pytest on JOBS
# processes.
PYTHON ?= python3
PIP_ARGS ?=
CONFIG ?= configs/digits_autoencoder.yaml
NPROC ?= 2
ARGS ?=
PYTEST_ARGS ?=
# Test files that run side by side. Many wait, for a deadline or a job, so that one more than there are cores fills the
# gaps; most start ranks of their own, so that more than four seldom pay. (nproc would believe OMP_NUM_THREADS.)
JOBS ?= $(shell n=$$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2); echo $$(( n < 4 ? n + 1 : 4 )))

# One thread a rank: ranks on one machine share its cores, and two pools of threads would fight over them.
export OMP_NUM_THREADS ?= 1

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-stamp

.DEFAULT_GOAL := help
.PHONY: help setup train test matrix lint docs format clean

help: ## Show what there is to make
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv and install everything that training and testing need

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null || { \
	  echo "kfac_dist needs Python 3.11, 3.12 or 3.13, but '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo missing)." \
	    "Name another one: make $(or $(MAKECMDGOALS),setup) PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[train,dev,mlxtend,hf,language,mpi,metrics,docs,report]'
	@# curvlinops' own needs bring it, and nothing calls it. A torchvision that was built for another torch takes half of
	@# transformers with it: what there is asks for it, and fails with it.
	$(BIN)/python -m pip uninstall --disable-pip-version-check --quiet --yes torchvision
	@# Its build needs the torch that is installed by now, and none of its extensions.
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt --quiet setuptools wheel ninja
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt \
	  --no-build-isolation deepspeed || echo "DeepSpeed can't be installed here: its tests will skip"
	@touch $@

train: setup ## Train CONFIG with distributed K-FAC on NPROC ranks
	@# A mistake is told before the launcher starts, which would wrap it in its own report.
	@$(BIN)/kfac-dist train $(CONFIG) $(ARGS) --check --quiet
	PYTHON=$(BIN)/python launch/torchrun.sh $(CONFIG) --nproc-per-node $(NPROC) $(ARGS)

test: setup ## Run the tests; fail below 90 % coverage of the package
	@$(BIN)/coverage erase
	@# The tests start hundreds of processes: without caches each would compile the package anew.
	PYTHONDONTWRITEBYTECODE= $(BIN)/coverage run -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)
	@# Only now have the processes that the tests started written what they ran.
	@$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

matrix: setup ## Try the oldest and newest versions, an environment for each (downloads some 15 GB); ARGS='--only oldest'
	$(BIN)/python -m benchmarks.matrix $(ARGS)

lint: setup ## Check style, formatting, types, shell scripts and image builds
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/shellcheck -x launch/*.sh slurm/*.sbatch docker/*.sh
	$(BIN)/hadolint docker/Dockerfile docker/Dockerfile.cpu

docs: setup ## Build the documentation site into site/; fail on broken links
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

format: setup ## Apply the style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## Remove caches and build products; keep .venv and runs/
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .coverage .coverage.* coverage.xml
	find kfac_dist tests -name __pycache__ -type d -prune -exec rm -rf {} +
