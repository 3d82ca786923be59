# make help says what there is. Every target sets up what it needs; the first run downloads it.
PYTHON ?= python3
# Everything that is installed or built stays inside this folder, whatever the home directory is.
export TRITONSMITH_CACHE ?= $(CURDIR)/.cache
export PIP_DISABLE_PIP_VERSION_CHECK := 1
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
RUN := .venv/bin/python

.PHONY: help demo models serve test test-container test-manifests test-tensorrt check format measure image-cpu
.PHONY: bench bench-compression pack-gpu clean
.DEFAULT_GOAL := help

help: ## Show these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' Makefile

.venv/.demo: pyproject.toml tools/constraints.txt tools/install.sh
	@PYTHON='$(PYTHON)' tools/install.sh demo 'keras,train,report,digits'

.venv/.dev: pyproject.toml tools/constraints.txt tools/install.sh
	@PYTHON='$(PYTHON)' tools/install.sh dev 'all,digits,minilm,dev'

.cache/manifest-tools/.done: tools/manifest-tools.txt
	@rm -rf .cache/manifest-tools && $(PYTHON) -m venv .cache/manifest-tools
	@echo 'installing the tools that lint manifests into .cache/manifest-tools' >&2
	@.cache/manifest-tools/bin/python -m pip install --quiet --no-input -r tools/manifest-tools.txt
	@touch $@

demo: .venv/.demo ## From a Keras .h5 to a validated, benchmarked Triton service
	@$(RUN) tools/recipes/digits/demo.py

models: .venv/.dev ## Build the weights of model_repository/
	@$(RUN) tools/recipes/make_models.py

serve: models ## Serve model_repository/ until Ctrl-C
	@$(RUN) -m tritonsmith serve model_repository

test: .venv/.dev ## Run the tests
	@$(RUN) -m pytest

test-container: models ## Build the CPU image, start it hardened, and test it; skips where no engine can be had
	@$(RUN) -m pytest -m container

measure: models ## Measure model_repository/ and render docker/ from that, on a quiet machine
	@$(RUN) tools/recipes/measure_models.py

image-cpu: ## Build the image tritonsmith-cpu, with what the stages of model_repository/ need
	@PYTHONPATH=tools $(PYTHON) -m tritonsmith.deploy.context model_repository docker
	@docker/build.sh cpu --build-arg "REVISION=$$(git rev-parse HEAD 2>/dev/null || echo unknown)"

test-manifests: .venv/.dev .cache/manifest-tools/.done ## Lint rendered manifests and Dockerfiles with the public tools
	@TRITONSMITH_MANIFEST_TOOLS='$(CURDIR)/.cache/manifest-tools/bin' $(RUN) -m pytest -m manifests

test-tensorrt: .venv/.dev ## Test the whole TensorRT 8.6.0 as far as it goes without a GPU (1.3 GB; needs CPython 3.10)
	@TRITONSMITH_TENSORRT_86=download $(RUN) -m pytest tests/engines/tensorrt/test_whole_86.py

check: .venv/.dev ## Lint and type-check
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy
	@$(RUN) -m tritonsmith lint model_repository --configs-only --for-container 26.07

format: .venv/.dev ## Format the code
	@$(RUN) -m ruff format .
	@$(RUN) -m ruff check --fix .

bench: .venv/.dev ## Measure again what perf/results/ holds
	@$(RUN) perf/overhead.py

bench-compression: .venv/.dev ## Compress, judge, time and serve the models of perf/compression.py (about an hour)
	@$(RUN) perf/compression.py

pack-gpu: .venv/.dev ## Pack tests and benchmark for a GPU machine without a package index (tests/gpu/README.md)
	@tests/gpu/run.sh pack build/gpu/pack

clean: ## Remove all that was installed or built here
	rm -rf .venv .cache build .pytest_cache .mypy_cache .ruff_cache docker/tritonsmith.tar.gz docker/constraints.txt
