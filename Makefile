# Two commands do all the set-up they need (Python 3.11+ and pip): `make demo` and `make test`.

SHELL := /bin/bash -o pipefail
ifndef PYTHON
PYTHON := $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
endif
VENV ?= .venv
BIN := $(VENV)/bin
MODEL ?=
PROGRAM ?=
WORKERS := $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); echo $$((n > 8 ? 8 : n)))
PYTEST_FLAGS ?= -n $(WORKERS)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-thorough test-kill coverage test-kernels test-upstream test-real test-honesty test-slurm test-recipes lint types pytest format bench venv clean

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

demo: $(VENV)/.ready-demo  ## convert a real small model, prove it equal, let it speak (MODEL=...); midtrain a tiny one
	@export PATH="$(abspath $(BIN)):$$PATH"; \
	$(if $(MODEL),flags=$$(python recipes/fitting.py "$(MODEL)") && eval "surgery run recipes/quickstart.yaml -v $$flags",\
	surgery run recipes/quickstart.yaml -v) && surgery run recipes/midtrain.yaml -j 2 && sed 1d runs/midtrain/steps/losses.log \
	$(if $(KEEP),,&& rm -rf runs/quickstart/copy* runs/quickstart/moe* runs/quickstart/back) && $(said)

# what is left after the demo, and what to type next
define said
printf '%s\n' '' "Results are in runs/quickstart (models) and runs/midtrain (report.html): \
$$(du -shc runs/quickstart runs/midtrain | tail -n 1 | cut -f 1).  $(if $(KEEP),,Copies, mixtures and the way back are removed; KEEP=1 keeps them.)" \
  'Next:  source $(VENV)/bin/activate' '       surgery inspect runs/quickstart/soup' \
  '       surgery convert runs/quickstart/soup runs/mine --to neox' '       surgery --help'
endef

test: lint types pytest  ## set up, then lint, type-check and run the tests

lint: $(VENV)/.ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.ready-dev
	$(BIN)/mypy

pytest: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS)

test-fast: $(VENV)/.ready-dev  ## the tests that take no more than a second or two each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS) -m "not slow and not thorough"

test-thorough: $(VENV)/.ready-dev  ## the whole matrices and long runs of kills that `make test` takes samples of
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS) -m thorough

test-kill: $(VENV)/.ready-dev  ## kill a training run 50 times at random, and compare what it comes to, bit for bit
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.killable_midtrain random $$(mktemp -d) 50
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.killable_midtrain calls $$(mktemp -d) 50

coverage: $(VENV)/.ready-dev  ## every test, and which lines of surgery/ they run
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS) --cov=surgery --cov-report=term:skip-covered

test-upstream: $(VENV)/.ready-dev  ## load the output with the programs it is for (minutes; PROGRAM=name for one of them)
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.upstream.run $(PROGRAM)
	$(if $(PROGRAM),,OMP_NUM_THREADS=1 $(BIN)/python -m tests.upstream.data)
	$(if $(PROGRAM),,OMP_NUM_THREADS=1 $(BIN)/python -m tests.upstream.tokens)
	$(if $(PROGRAM),,OMP_NUM_THREADS=1 $(BIN)/python -m tests.upstream.optimizer)
	$(if $(PROGRAM),,OMP_NUM_THREADS=1 $(BIN)/python -m tests.upstream.states)

test-honesty: $(VENV)/.ready-dev  ## does `verify` ever call two models the same that are not? (an hour on two cores)
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.honesty

test-kernels: $(VENV)/.ready-dev  ## Triton's kernels for experts, on the CPU by its interpreter (installs Triton, 1 GB)
	$(BIN)/pip install -qq --no-deps --no-build-isolation --upgrade --target .cache/kernels \
		triton==3.9.0 megablocks==0.10.0 stanford-stk==0.7.1
	PYTHONPATH=.cache/kernels TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_expert_kernels.py

test-real: $(VENV)/.ready-dev  ## upcycle a real small model in every exact way, through files (half an hour on one core)
	-$(BIN)/python recipes/small_model.py
	SURGERY_REAL=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/real -v

test-slurm: $(VENV)/.ready-dev  ## batch scripts under a Slurm of one node (Debian's packages, as root; minutes)
	@command -v slurmctld >/dev/null || apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client \
		slurm-wlm-basic-plugins slurm-wlm-torque munge
	SURGERY_SLURM=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/cluster -v

test-recipes: $(VENV)/.ready-dev  ## the small twins of all recipes, end to end (half an hour on one core)
	SURGERY_RECIPES=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_recipe_twins.py -v

format: $(VENV)/.ready-dev  ## format the code and apply safe lint fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.ready-dev  ## time and memory of a conversion, against cp
	@mkdir -p .cache/bench
	$(BIN)/python bench/convert.py --dir .cache/bench

venv: $(VENV)/.ready-dev  ## the pinned environment that the tests run in

clean:  ## remove the environment, caches and build output
	rm -rf $(VENV) .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch goes first and by its exact version: indexes that offer a CPU-only build give it for nothing else.
define install
	@$(BIN)/python -c '' 2>/dev/null || { \
		[ -n "$(PYTHON)" ] || { echo "make: Python 3.11 or newer is needed; name it with PYTHON=..." >&2; exit 1; }; \
		echo "creating $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing the pinned packages (once; some minutes on a slow connection)"
	@$(BIN)/pip install "$$(grep -m1 '^torch==' constraints.txt)" -c constraints.txt
	@$(BIN)/pip install -e '.[$(1)]' -c constraints.txt
	@touch $@
endef

$(VENV)/.ready-demo: pyproject.toml constraints.txt
	$(call install,demo)

$(VENV)/.ready-dev: pyproject.toml constraints.txt
	$(call install,dev$(comma)merge)
	@touch $(VENV)/.ready-demo

comma := ,
