# make help lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
GPU_PYTHON ?= python3
OUT ?= benchmarks/results
WHEELS ?=
SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cuh csrc/*/*.cpp csrc/*/*.cu)

.DEFAULT_GOAL := help
.PHONY: help setup demo test check format lint types bench gpu image cluster faults fuzz scale audit clean

help: ## show the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## create .venv, install pinned requirements, build the extension

$(READY): constraints.txt pyproject.toml setup.py $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Python 3.11 or newer is needed"; \
	  echo "  hint: apt-get install python3 python3-venv, or make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	  rm -rf $(VENV); echo "error: the venv module is missing"; \
	  echo "  hint: apt-get install python3-venv"; exit 1; }
	@command -v g++ > /dev/null || { \
	  echo "warning: no C++ compiler: the reference ops will be used"; \
	  echo "  hint: apt-get install g++"; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  torch setuptools wheel pybind11 ninja
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  --no-build-isolation -e '.[dev]'
	@touch $@

demo: setup ## run the main job on real handwritten digits, print the attribution table
	$(BIN)/attr-batch run examples/digits/job.yaml

test: setup ## run all tests that need no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m 'not e2e'
	$(BIN)/python -m pytest -m e2e

check: setup format lint types ## what CI runs: format, lint, types, native code, tests
	$(BIN)/python setup.py compile_cuda
	$(MAKE) --no-print-directory test

format: setup
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES) $(wildcard tests/cuda_on_cpu/*)

lint: setup
	$(BIN)/ruff check .

types: setup
	$(BIN)/pyright

bench: setup ## run the benchmarks, write benchmarks/results/*.json
	for name in estimators ops demo store mirror; do \
	  $(BIN)/python benchmarks/$$name.py --json > benchmarks/results/$$name.new || exit 1; \
	  mv benchmarks/results/$$name.new benchmarks/results/$$name.json; \
	done

gpu: ## on a CUDA machine: build, test, benchmark in 9 minutes (OUT=folder WHEELS=folder)
	$(GPU_PYTHON) benchmarks/gpu.py --out '$(OUT)' $(if $(WHEELS),--wheels '$(WHEELS)')

image: setup ## build the container image with podman and test it
	docker/smoke.sh

cluster: setup ## the manifests in real containers: Indexed-Job emulation (after make image)
	$(BIN)/python tests/cluster/indexed_job.py --json > benchmarks/results/cluster.new
	mv benchmarks/results/cluster.new benchmarks/results/cluster.json

faults: setup ## kill, starve and damage real jobs in every way, write benchmarks/results/faults.json
	$(BIN)/python -m tests.faults --out benchmarks/results/faults.json

fuzz: setup ## 100,000 hostile inputs, write benchmarks/results/fuzz.json
	$(BIN)/python benchmarks/fuzz.py --json > benchmarks/results/fuzz.new
	mv benchmarks/results/fuzz.new benchmarks/results/fuzz.json

scale: setup ## 1,000 shards of 100,000 coalitions, a tenth of it in a bucket, write scale.json
	$(BIN)/python benchmarks/scale.py --into benchmarks/results/scale.json
	$(BIN)/python benchmarks/scale.py --into benchmarks/results/scale.json \
	  --store bucket --coalitions 10000 --shards 100

audit: setup ## vulnerabilities, licences, integrity, pins of what is installed
	@$(PYTHON) -m venv build/audit && \
	  build/audit/bin/python -m pip install --quiet pip-audit==2.10.1 || true
	$(BIN)/python tests/audit.py --pip-audit build/audit/bin/pip-audit

clean: ## remove the environment and build outputs
	rm -rf $(VENV) build *.egg-info attr_batch/*.so
