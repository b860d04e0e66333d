# `make` lists what there is. Two commands matter to a newcomer: `make demo` and `make test`.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# Programs that the machine lacks are kept outside the checkout, beside the cluster's built ones.
TOOLS := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/resilientllm/tools
export PATH := $(TOOLS)/go/bin:$(PATH):$(TOOLS)/uv/bin
# Setup alone changes the environment; anything else that did so would do it under running processes.
RUN := uv run --no-sync
SYNCED := .venv/.synced

# Of local mode.
MODEL ?= build/tiny
INSTANCES ?= 2
STAGES ?= 2
PORT ?= 8000
# Passed on: make test PYTEST_ARGS="-k fence", make bench BENCH_ARGS=--quick, make demo DEMO_ARGS="--stage 0"
PYTEST_ARGS ?=
BENCH_ARGS ?=
DEMO_ARGS ?=
CHAOS_ARGS ?=
# Of chaos: some kinds, or all; runs of each.
FAULTS ?=
RUNS ?= 20
# Of the worker image: cpu or gpu.
VARIANT ?= cpu
TAG ?= dev

.PHONY: help setup test unit e2e lint format types imports generate local bench chaos demo demo-down kind-smoke images clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(SYNCED) ## install what the machine lacks, and the environment in .venv

# Compiled ahead, because containers see the environment read-only and would compile it at every start.
$(SYNCED): uv.lock pyproject.toml api/pyproject.toml cli/pyproject.toml operator/pyproject.toml worker/pyproject.toml
	@tools/prepare '$(TOOLS)'
	@uv sync --frozen --compile-bytecode
	@touch $@

# Everything is one pytest run, so that its last lines tell all. Root conftest.py puts the quick tests first.
test: setup ## all but the longest: lint, types, import rules, unit, contract, integration, the cluster (root)
	@$(RUN) pytest -m 'not long' $(PYTEST_ARGS)

unit: setup ## checks, unit and contract tests: no vLLM process, no cluster
	@$(RUN) pytest -m 'not engine and not cluster' $(PYTEST_ARGS)

e2e: setup ## the tests on a real cluster only, also the longest (root)
	@$(RUN) pytest -m cluster $(PYTEST_ARGS)

lint: setup ## ruff: rules and format
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .

format: setup ## let ruff rewrite what it can
	@$(RUN) ruff check --fix .
	@$(RUN) ruff format .

types: setup ## mypy, strict
	@$(RUN) mypy

imports: setup ## who may import whom
	@$(RUN) lint-imports --no-logo

generate: setup ## write anew what is made from code: crds/, docs/api.md, docs/metrics.md, and the chart from the manifests
	@$(RUN) resilientllm-generate-crd crds
	@$(RUN) python -m tools.api_reference
	@$(RUN) python -m tools.metrics_reference
	@$(RUN) python tools/generate_chart.py

build/tiny: $(SYNCED)
	@$(RUN) resilientllm make-tiny-model $@
	@touch $@

local: setup $(filter build/tiny,$(MODEL)) ## engines and stages as processes of this machine; Ctrl-C stops them
	@exec $(RUN) resilientllm local up --model '$(MODEL)' --instances $(INSTANCES) --stages $(STAGES) --port $(PORT)

bench: setup ## kills under load, beside stock vLLM; writes build/bench.json
	@$(RUN) resilientllm bench $(BENCH_ARGS)

chaos: setup ## faults under load, each proven; FAULTS=hang,node-killed and RUNS=20 choose; writes build/chaos.jsonl (root)
	@$(RUN) python -m e2e.chaos --faults '$(FAULTS)' --runs $(RUNS) $(CHAOS_ARGS)

demo: setup ## a real Kubernetes, a kill in mid-stream, the same stream; writes build/demo.json (root)
	@$(RUN) python -m e2e.demo up $(DEMO_ARGS)

demo-down: setup ## remove all that the demo made
	@$(RUN) python -m e2e.demo down

kind-smoke: setup ## show that the kind provider works, with a Docker of its own if need be (root)
	@$(RUN) python -m e2e.cluster kind-smoke

images: ## build both images with Docker; VARIANT=cpu or gpu chooses the worker's
	docker build --file operator/Dockerfile --tag resilientllm/operator:$(TAG) .
	docker build --file worker/Dockerfile --build-arg VARIANT=$(VARIANT) --tag resilientllm/worker:$(TAG) .

clean: ## remove what was built in the checkout, and keep .venv
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
