# The two commands are `make up` and `make test`; each first asks .ci/need for what is missing.

SHELL := /usr/bin/env bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# Extra arguments for `make up`, for example ARGS="--workers 4 --port 9000".
ARGS ?=
# Seconds per fuzz target.
FUZZ_SECONDS ?= 60
FUZZ_TARGETS := http_body exchange_frame safetensors_header expert_trace

# The property tests of `make test` draw the same cases every time: what it says is said of the change, not of the day.
# New cases are drawn by `make soak`, as often as ROUNDS says.
SEED ?= 1
ROUNDS ?= 10

# In CI a test that cannot run is a failure, not a skip.
ifeq ($(CI),true)
export FOREGATE_E2E_REQUIRE ?= 1
endif

# What tests could not run here and why: `make test` ends with it.
SKIPPED := $(CURDIR)/target/skipped

# Launches of CUDA kernels that tests record for `make sanitize`, and what `make cuda` makes.
CUDA := $(CURDIR)/target/cuda

.PHONY: help up test lint cluster test-cluster on-cluster unit cuda sanitize soak fuzz bench bench-peers bench-gateway image-cuda gpu-check

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

up: ## install what is missing, build, serve the demonstration model on port 8000
	@.ci/need build
	cargo build --release --bin foregate
	@exec target/release/foregate up $(ARGS)

test: ## install what is missing, lint, every test, those on a Kubernetes cluster too, every fuzz target for a minute
	@.ci/need test
	@$(MAKE) --no-print-directory lint
	@mkdir -p $(dir $(SKIPPED)) && rm -f $(SKIPPED)
	@rm -rf $(CUDA)/cases
	@FOREGATE_CUDA_RECORD=$(CUDA)/cases $(MAKE) --no-print-directory unit
	@kernels/cuda/sanitize $(CUDA)/cases $(CUDA)
	@$(MAKE) --no-print-directory cuda
	@$(MAKE) --no-print-directory cluster
	@$(MAKE) --no-print-directory on-cluster
	@$(MAKE) --no-print-directory fuzz
	@if [ -s $(SKIPPED) ]; then sort $(SKIPPED) | uniq -c | sed 's/^ *\([0-9]*\) skipped/SKIPPED \1/'; fi

lint: ## format check and clippy, warnings are errors
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings

# Once per version of them; the second time it takes a second. KUBECONFIG names a cluster that is there already.
cluster: ## the components of the tests' own Kubernetes cluster, built where root on Linux can run it
	@if [ -n "$${KUBECONFIG:-}" ] || [ "$$(id -u)" != 0 ] || [ "$$(uname -s)" != Linux ]; then \
	  echo "cluster: nothing to build here"; \
	else e2e/cluster/run build >/dev/null; fi

test-cluster: ## install what is missing, build a Kubernetes cluster's components once (25 minutes), test on a real cluster
	@.ci/need cluster
	@$(MAKE) --no-print-directory cluster
	@$(MAKE) --no-print-directory on-cluster

on-cluster:
	FOREGATE_E2E_SKIPPED=$(SKIPPED) cargo test --workspace --test cluster

# Test programs run one after the other, so the end-to-end ones do not fight for the cores.
unit:
	FOREGATE_E2E_SKIPPED=$(SKIPPED) PROPTEST_RNG_SEED=$(SEED) cargo test --workspace

cuda: ## compile and assemble the CUDA kernels for every card, hold them to their ceilings, embed them (no card is needed)
	@SKIPPED=$(SKIPPED) kernels/cuda/check $(CUDA)

sanitize: ## run the CUDA kernels on the CPU under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer
	@rm -rf $(CUDA)/cases
	FOREGATE_CUDA_RECORD=$(CUDA)/cases cargo test --workspace --test kernels
	@kernels/cuda/sanitize $(CUDA)/cases $(CUDA)

soak: ## all tests but the end-to-end ones, ROUNDS times, each time with new random cases
	for round in $$(seq $(ROUNDS)); do cargo test --workspace --exclude foregate; done

fuzz: ## each fuzz target for FUZZ_SECONDS; a crash is a failure
	@for target in $(FUZZ_TARGETS); do e2e/fuzz/run "$$target" "$(FUZZ_SECONDS)"; done

bench: ## decode and prefill speed of the engine, and its share of what memory allows
	cargo build --release --bin foregate
	target/release/foregate bench engine --model e2e/models/demo

# Threads of each engine, and where the figures go. ROUNDS=1 is a quick look.
THREADS ?= 2
OUT ?= docs/bench/cpu
bench-peers: ROUNDS = 3
bench-peers: ## vLLM and llama.cpp beside Foregate, in turns: table, JSON and plot under OUT
	@.ci/need peers
	cargo build --release --bin foregate
	@e2e/peers/run target/release/foregate "$(OUT)" "$(ROUNDS)" "$(THREADS)"

# More rounds say more; GATEWAY_ARGS goes to `foregate bench gateway`.
GATEWAY_ARGS ?=
bench-gateway: OUT = docs/bench/gateway
bench-gateway: ## Foregate's gateway and SMG before back ends that compute nothing, in turns: table, JSON and plot under OUT
	@.ci/need gateway
	cargo build --release --bin foregate
	@e2e/peers/gateway target/release/foregate "$(OUT)" $(GATEWAY_ARGS)

# Where the image goes.
IMAGE ?= target/image/foregate-cuda.tar

gpu-check: ## pack the check of this build for a machine with a card into target/gpu-kit, and run it: what needs none where there is none
	@.ci/need cuda
	CUDA_HOME="$$(kernels/cuda/toolkit)" cargo build --release --locked --features cuda --bin foregate
	kernels/cuda/kit target/release/foregate target/gpu-kit
	@if [ -e /dev/nvidia0 ]; then python3 target/gpu-kit/gpu_check.py target/gpu-kit target/gpu-check; else \
	  echo "gpu-check: no card here, so only what needs none runs; the rest: gpu_check.py KIT OUT on a machine that has one"; \
	  python3 target/gpu-kit/gpu_check.py target/gpu-kit target/gpu-check --no-card; fi

image-cuda: ## the image for nodes with cards, without Docker, and its tests
	@.ci/need cuda
	CUDA_HOME="$$(kernels/cuda/toolkit)" cargo build --release --locked --features cuda --bin foregate
	.ci/image/build --cuda target/release/foregate localhost/foregate:cuda "$(IMAGE)" e2e/models/demo=/e2e/models/demo
	FOREGATE_CUDA_PROGRAM="$(CURDIR)/target/release/foregate" cargo test --workspace --test image -- --nocapture
