# Needs Python 3.11 or 3.12, git and make; everything else goes into .venv. See `make help`.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo demo-real dashboards docs test test-dashboards test-ranks test-gpu bench-kernels bench-serving
.PHONY: bench-trainer bench-trainer-cpu bench-background bench-control bench-rollback bench-gil bench-publish lab house
.PHONY: lint clean

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
# Extra words for pip when it installs torch, for example an index with CPU-only builds.
TORCH_PIP_ARGS ?=
# Words for pytest or for the demo, for example ARGS="-k wire".
ARGS ?=

# The Python of the targets that need a GPU: it has torch for CUDA, triton, pytest and hypothesis of its own.
PYTHON ?= python3

export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 24

setup: $(READY) ## make .venv with everything that the demo and the tests need

# torch comes first and alone, so that nothing else chooses its build; SGLang comes without its CUDA dependencies.
$(READY): requirements-cpu.txt pyproject.toml
	@python=; for name in python3 python3.12 python3.11 python; do \
	  if $$name -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then \
	    python=$$name; break; fi; done; \
	if [ -z "$$python" ]; then \
	  echo "setup: no Python 3.11 or 3.12 found (python3 is $$(python3 --version 2>&1 || true)); install one of them" >&2; exit 1; fi; \
	echo "setup: $$($$python --version) into $(VENV), about three minutes and 2.6 GB"; \
	[ -x $(BIN)/python ] || $$python -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH_PIP_ARGS) torch==2.13.0
	$(BIN)/python -m pip install --quiet -r requirements-cpu.txt
	$(BIN)/python -m pip install --quiet --no-deps sglang==0.5.23
	$(BIN)/python -m pip install --quiet --no-deps -e .
	@touch $@

demo: setup ## serve, train and swap for real, with live progress and a picture at the end
	$(BIN)/python scripts/demo.py $(ARGS)

demo-real: setup ## the same on a real model and real chat: ARGS="--model DIRECTORY_OR_HUB_NAME --prompts FILE"
	HF_HUB_OFFLINE=0 $(BIN)/python scripts/demo_real.py $(ARGS)

test: setup ## run the tests, in two processes side by side
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder $(ARGS)

dashboards: setup ## print the dashboard from its source, and say how to load it and the rules
	$(BIN)/python scripts/dashboard.py
	@cat docs/dashboards/README.md

docs: setup ## print the tables of docs/ from the declarations that they repeat
	$(BIN)/python scripts/print_docs.py

test-dashboards: setup ## every panel, rule and alert against a real Prometheus that scrapes a real server and trainer
	$(BIN)/python -m pytest tests/test_dashboards.py
	$(BIN)/python scripts/check_dashboards.py $(ARGS)

test-ranks: setup ## a server of two tensor-parallel ranks on the CPU: swaps together, metrics of each
	AURORA_TENSOR_PARALLEL=1 $(BIN)/python -m pytest tests/loop/test_tensor_parallel.py

test-gpu: ## run the kernels' tests on this machine's GPU, at full size, with PYTHON=python3
	@$(PYTHON) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "test-gpu: no GPU here")'
	@$(PYTHON) -c 'import aurora_kernels' 2>/dev/null || $(PYTHON) -m pip install --quiet --no-deps --no-build-isolation -e .
	env -u TRITON_INTERPRET $(PYTHON) -m pytest tests/kernels --ignore tests/kernels/test_interpreter.py $(ARGS)

bench-kernels: ## kernels and what one would use instead, one table, on this machine's GPU with PYTHON=python3
	@$(PYTHON) -c 'import aurora_kernels' 2>/dev/null || $(PYTHON) -m pip install --quiet --no-deps --no-build-isolation -e .
	env -u TRITON_INTERPRET $(PYTHON) scripts/bench_kernels.py --out docs/results/$$(date +%F)-bench-kernels.json $(ARGS)

bench-serving: setup ## what Aurora costs a server: capture on and off, interleaved, with the trainer in every state
	$(BIN)/python scripts/bench_serving.py $(ARGS)

bench-trainer: setup ## tokens a second from a socket to the optimizer, the device's work stubbed by its arithmetic
	$(BIN)/python scripts/bench_trainer.py $(ARGS)

bench-trainer-cpu: setup ## a training step on the CPU against dense PyTorch: tokens per second and peak memory
	$(BIN)/python scripts/bench_trainer_cpu.py $(ARGS)

lab: setup ## compare ways of learning on a real model's traffic: ARGS="record|run STAGE|report ..."
	HF_HUB_OFFLINE=0 $(BIN)/python scripts/lab.py $(ARGS)

bench-background: setup ## what writing versions and checkpoints costs the training loop
	$(BIN)/python scripts/bench_background.py $(ARGS)

bench-control: setup ## a server that chooses its draft steps against a plain one: ARGS="--good TRAINED_DRAFT"
	$(BIN)/python scripts/bench_control.py $(ARGS)

bench-rollback: setup ## bad versions on a real server, changes of traffic, 1,000 swaps of equal drafts: ARGS="--good TRAINED_DRAFT"
	$(BIN)/python scripts/bench_rollback.py $(ARGS)

bench-gil: setup ## how long a new version keeps the scheduler's thread from running
	$(BIN)/python scripts/bench_gil.py $(ARGS)

bench-publish: setup ## what publishing a verify step takes of the interpreter's lock
	$(BIN)/python scripts/bench_publish.py $(ARGS)

house: setup ## the goals of the layout, and what they are now
	$(BIN)/python scripts/house.py

lint: setup ## check the style and the types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove what was built and cached, the virtual environment included
	rm -rf $(VENV) .cache build .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
