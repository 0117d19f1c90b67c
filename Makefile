# `make demo` and `make test` are all a new user needs. Both work in a virtual environment that
# they make themselves and bring up to date when pyproject.toml or constraints.txt changed.

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
WORKERS ?= 2
THREADS ?= 1
PYTEST_ARGS ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq --retries 10 -c constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint format gpu-check clean

help: ## Show this table
	@echo "make TARGET [NAME=value ...]"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  PYTHON       Python 3.10 or newer to build $(VENV) with (now: $(PYTHON))"
	@echo "  VENV         where the virtual environment goes (now: $(VENV))"
	@echo "  TORCH_INDEX  another index for PyTorch; on Linux the default wheel brings CUDA along (2 GB"
	@echo "               and more), https://download.pytorch.org/whl/cpu has the small CPU build"
	@echo "  WORKERS      test processes (now: $(WORKERS)), each with THREADS threads (now: $(THREADS))"
	@echo "  PYTEST_ARGS  more arguments for pytest, for example PYTEST_ARGS='-k fold -x'"

demo: $(INSTALLED) ## Compress a small network that reads digits, and show what it gained
	@echo "demo: running examples/digits/compress.py"
	@$(BIN)/python examples/digits/compress.py

test: lint ## Run all checks and all tests
	@echo "test: running pytest on $(WORKERS) workers"
	@OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup $(PYTEST_ARGS)

lint: $(INSTALLED) ## Check style (ruff), format (ruff) and types (mypy)
	@echo "lint: ruff check, ruff format, mypy"
	@$(BIN)/python -m ruff check --quiet
	@$(BIN)/python -m ruff format --check --quiet || { echo "lint: 'make format' mends the format" >&2; exit 1; }
	@$(BIN)/python -m mypy --no-error-summary

format: $(INSTALLED) ## Write the format, and mend what ruff can mend
	@echo "format: ruff check --fix, ruff format"
	@$(BIN)/python -m ruff check --fix --quiet
	@$(BIN)/python -m ruff format --quiet

gpu-check: $(INSTALLED) ## Prove every runtime, and run the latency benchmark where there is a GPU
	@echo "gpu-check: running benchmarks/gpu_check.py"
	@$(BIN)/python benchmarks/gpu_check.py

clean: ## Remove the virtual environment, builds and caches
	@echo "clean: removing $(VENV), builds and caches"
	@rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone, at its exact version, so that no looser request can choose another
# build. pytorchcv (networks for the tests) declares packages that nothing here needs.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "setup: fxmerge needs Python 3.10 or newer; name one: make PYTHON=python3.11" >&2; exit 1; }
	@test -x $(BIN)/pip || { echo "setup: making the virtual environment $(VENV)"; \
		$(PYTHON) -m venv $(VENV); }
	@echo "setup: installing PyTorch (the largest part, some minutes the first time)"
	@$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
		"$$(grep '^torch==' constraints.txt)" "$$(grep '^setuptools==' constraints.txt)"
	@echo "setup: installing fxmerge and its tools at the versions of constraints.txt"
	@$(PIP) --no-build-isolation -e '.[dev]'
	@$(PIP) --no-deps pytorchcv
	@touch $@
