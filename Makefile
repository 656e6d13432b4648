# One command each; `make help` lists them. Everything is installed into .venv, nothing outside this folder.

SHELL := /bin/bash
PYTHON := .venv/bin/python
INSTALLED := .venv/.installed
# The Python that .venv is made with, and the torch build: cpu, auto, cu126, ... (empty: what the package index serves).
PYTHON_VERSION ?= >=3.11,<3.14
TORCH_BACKEND ?=
NGPUS ?= 1
MAX_RESTARTS ?= 3
GPUS ?= 0
ARGS ?=
# Passed to recipes through the environment, as typed: neither make nor a shell expands anything in them.
override NGPUS := $(value NGPUS)
override MAX_RESTARTS := $(value MAX_RESTARTS)
override GPUS := $(value GPUS)
override ARGS := $(value ARGS)
override PYTHON_VERSION := $(value PYTHON_VERSION)
override TORCH_BACKEND := $(value TORCH_BACKEND)
export NGPUS MAX_RESTARTS GPUS ARGS PYTHON_VERSION TORCH_BACKEND

# Without bytecode files every process that imports torch compiles it again, for ten seconds; so they are written at
# installation, even for users who forbid Python to write them.
unexport PYTHONDONTWRITEBYTECODE
export UV_COMPILE_BYTECODE ?= 1

# The uv on the PATH if it runs, else a private one.
UV := $(if $(shell uv --version 2>/dev/null),uv,.uv/bin/uv)

# If the Python of .venv is gone, as after an upgrade of the system's, or too old, .venv is made again.
UNUSABLE := $(if $(shell .venv/bin/python -c 'import sys; print(sys.version_info >= (3, 11) or "")' 2>/dev/null),,FORCE)

# uv needs a cache that it can write: in .uv if the home directory cannot be written.
ifeq ($(shell cache="$${XDG_CACHE_HOME:-$$HOME/.cache}"; mkdir -p "$$cache" 2>/dev/null && test -w "$$cache" || echo no),no)
export UV_CACHE_DIR ?= .uv/cache
endif

# pip's setting $(1) (find-links, index-url, ...), from its environment or its files; empty if there is none.
# uv reads neither of them, and expects commas where pip has blanks.
pip_setting = $$(for section in :env: global install; do \
	python3 -m pip config get $$section.$(1) 2>/dev/null && break; done | xargs | tr ' ' ',')
define as_pip_is_set
	links="$${UV_FIND_LINKS:-$(call pip_setting,find-links)}"; \
	index="$${UV_DEFAULT_INDEX:-$(call pip_setting,index-url)}"; \
	if [ -n "$$links" ]; then export UV_FIND_LINKS="$$links"; fi; \
	if [ -n "$$index" ]; then export UV_DEFAULT_INDEX="$$index"; fi
endef

.DEFAULT_GOAL := help
.PHONY: FORCE help environment uv uvlock venv train shakespeare test lint format ddp-train doctor gpu-status kill-gpu gpu-hot clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-12s %s\n", $$1, $$2}' Makefile

environment: $(INSTALLED) ## set everything up in .venv: uv, the pinned packages, the project editable (TORCH_BACKEND=cpu|auto|cu126)

uv: $(filter .uv/bin/uv,$(UV)) ## make sure that uv is there: the one on the PATH, else one in .uv
	@$(UV) --version

venv: .venv/pyvenv.cfg ## create an empty .venv (PYTHON_VERSION=3.12)

train: environment ## train GPT-2 124M on the bundled text, with a budget for this machine
	$(PYTHON) -m experiments.quickstart

shakespeare: environment ## train a small character model to readable text
	$(PYTHON) -m experiments.shakespeare

test: environment ## run the tests
	$(PYTHON) -m pytest -n 2 --dist loadfile
	@if nvidia-smi >/dev/null 2>&1; then set -x; $(PYTHON) -m pytest -m gpu; fi

lint: environment ## check style, format and types
	@failed=0; for check in "ruff check" "ruff format --check" pyright; do \
		echo "$$check"; .venv/bin/$$check || failed=1; done; exit $$failed

format: environment ## sort imports, fix what can be fixed, and format
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

ddp-train: environment ## train GPT-2 124M on several GPUs (NGPUS=8 MAX_RESTARTS=3 ARGS='--data.path data/openwebtext')
	@$(PYTHON) experiments/launch/gpus.py ddp-train

doctor: environment ## look at this machine before a run does (ARGS='--data-path data/openwebtext')
	@$(PYTHON) experiments/launch/gpus.py doctor

gpu-status: ## show each GPU's memory and use, and who computes on it
	@python3 experiments/launch/gpus.py status

kill-gpu: ## list your own GPU processes, ask, then end them
	@python3 experiments/launch/gpus.py kill

gpu-hot: environment ## keep GPUs busy with matrix products until Ctrl-C (GPUS=0,1,2)
	@$(PYTHON) experiments/launch/gpus.py hot

uvlock: uv ## pin the newest packages that pyproject.toml admits in requirements.lock
	@# No find-links: a local build's version would be pinned. No CUDA packages: torch names its own at installation.
	@set -o pipefail; env -u UV_FIND_LINKS $(UV) pip compile --quiet --universal --upgrade --extra dev \
		--no-header --no-annotate pyproject.toml \
		| grep -vE "^(nvidia|cuda|triton)|== '(win32|emscripten)'" > requirements.lock.part
	mv requirements.lock.part requirements.lock

clean: ## remove .venv, .uv and caches; runs/ and data/ stay
	rm -rf .venv .uv .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.uv/bin/uv:
	python3 -m venv .uv
	.uv/bin/python -m pip install --quiet uv

FORCE:

.venv/pyvenv.cfg: $(UNUSABLE) | $(filter .uv/bin/uv,$(UV))
	$(UV) venv --quiet --allow-existing --python "$$PYTHON_VERSION" .venv

# Two steps, so that the build backend of the editable install is the pinned one. `install`, not `sync`: on a GPU
# machine torch brings CUDA packages that the lock does not name, and `sync` would remove them.
$(INSTALLED): requirements.lock pyproject.toml .venv/pyvenv.cfg
	@echo "installing packages into .venv: minutes where they have to be downloaded"
	@$(as_pip_is_set); set -x; \
	$(UV) pip install --quiet --python $(PYTHON) $${TORCH_BACKEND:+--torch-backend="$$TORCH_BACKEND"} \
		-r requirements.lock && \
	$(UV) pip install --quiet --python $(PYTHON) --no-deps --no-build-isolation --editable . && \
	$(PYTHON) -m compileall -q nanogpt experiments benchmarks
	@touch $@
