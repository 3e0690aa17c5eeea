# Every target does its own set-up: a virtual environment in .venv with fastmerge, its extension and the tested versions.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
    $$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/fastmerge.stamp

# Tests hold one thread each and run beside each other; small tensors gain nothing from more. They start hundreds of
# processes, which would each compile the package again where bytecode is not kept.
TEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-ptx test-newest test-gpu lint format soak fuzz sanitize bench bench-smoke bench-data bench-check gpu evidence coverage \
    coverage-zoo docs docs-site clean

help: ## what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

setup: $(READY) ## the virtual environment alone

$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	    echo "fastmerge needs Python 3.10 or newer as $(or $(PYTHON),python3); name another with make PYTHON=..." >&2; exit 1; }
	@rm -f $(READY)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); }
	@echo "Installing fastmerge and what it needs into $(VENV): a few minutes, once."
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[dev]"
	@$(BIN)/python -c "import torch, fastmerge._compaction, fastmerge._batch_norm" 2>/dev/null || echo "The C++ extensions were not built; PyTorch does the same, slower."
	@touch $(READY)

demo: $(READY) ## merges sine networks, then networks that read real digits, and reports
	$(BIN)/fastmerge run sine --replicates 5 --strategy student,bo3,one --out runs/demo/sine --resume
	$(BIN)/fastmerge run digits --out runs/demo/digits --resume
	$(BIN)/fastmerge report runs/demo/sine
	$(BIN)/fastmerge report runs/demo/digits

# By file: one process reads a network's code once for all tests of a file, and none waits for another's interpreted kernels.
test: $(READY) ## the tests that need no GPU and no patience
	$(TEST) -n $(JOBS) --dist loadfile

test-slow: $(READY) ## the tests that take minutes: every torchvision network, isolated installs
	$(TEST) -n $(JOBS) -m "slow and not gpu"

test-ptx: $(READY) ## the kernels' PTX for Hopper, executed on the CPU, against float64: minutes
	$(TEST) -n $(JOBS) -m ptx

# The tested versions are not asked for here, and a copy of the source keeps this environment's extensions apart from .venv's.
NEWEST := build/newest
test-newest: ## the tests with the newest PyTorch, torchvision, Triton and NumPy that pip gives
	rm -rf $(NEWEST)
	mkdir -p $(NEWEST)/source
	cp -r $(filter-out build,$(wildcard *)) $(NEWEST)/source
	rm -f $(NEWEST)/source/fastmerge/*.so
	$(PYTHON) -m venv $(NEWEST)/venv
	$(NEWEST)/venv/bin/python -m pip install --upgrade --editable "$(NEWEST)/source[dev]"
	cd $(NEWEST)/source && OMP_NUM_THREADS=1 ../venv/bin/python -m pytest -n $(JOBS) --dist loadfile

test-gpu: $(READY) ## the tests that need a CUDA GPU
	$(BIN)/python -m pytest -m gpu

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## what ruff can put right by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

SOAK_MINUTES ?= 30
soak: $(READY) ## random kills, full disks and damaged files against every command; SOAK_MINUTES=30, SOAK_OPTIONS="--seed S"
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py --minutes $(SOAK_MINUTES) $(SOAK_OPTIONS)

FUZZ_EXAMPLES ?= 2000
fuzz: $(READY) ## FUZZ_EXAMPLES=2000 damaged or random inputs for each reader of files and for the C++ extension
	FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(TEST) tests/parts/test_fuzz.py

# The sanitizers' runtime must be the first library of the process, so Python starts with it preloaded. Leaks are not looked
# for: the interpreter and torch leave plenty at exit.
SANITIZED := build/sanitize/lib
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -O1 -g
sanitize: $(READY) ## the extensions' tests under the address and undefined-behaviour sanitizers
	rm -rf build/sanitize
	CXXFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" $(BIN)/python setup.py --quiet build --build-base build/sanitize --build-lib $(SANITIZED)
	for library in compaction batch_norm; do nm -D $(SANITIZED)/fastmerge/_$$library*.so | grep -q __asan_init || exit 1; done
	LD_PRELOAD="$$(cc -print-file-name=libasan.so) $$(cc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	    PYTHONPATH=$(SANITIZED) $(TEST) -p no:cacheprovider --override-ini pythonpath=$(SANITIZED) \
	        --capture=sys -k "not peak_of_memory and not compiled_it" tests/parts/test_compaction*.py tests/parts/test_kernels_batch_norm_cpu.py \
	        tests/parts/test_fuzz.py::test_compaction_of_any_tensor tests/parts/test_fuzz.py::test_compaction_of_nonsense

NEW ?= runs/benchmarks.json
bench: $(READY) ## the benchmarks that this machine can run, as JSON in runs/
	mkdir -p runs
	$(BIN)/python -m pytest benchmarks -m "not slow" --benchmark-enable --benchmark-json runs/benchmarks.json

bench-smoke: $(READY) ## that the benchmarks run: small cases, three samples each, JSON in runs/
	mkdir -p runs
	$(BIN)/python -m pytest benchmarks -m "not slow" -k "lenet or sine or bench_gate" --rounds 3 \
	    --benchmark-enable --benchmark-max-time 0.1 --benchmark-json runs/smoke.json

bench-check: $(READY) ## whether NEW=...json (runs/benchmarks.json) has become slower than BASE=...json, as ratios within each
	@test -n "$(BASE)" || { echo "bench-check needs BASE=...json, such as a file of benchmarks/results" >&2; exit 2; }
	$(BIN)/python -m benchmarks.compare $(BASE) $(NEW)

NAME ?= loaders-cpu
bench-data: $(READY) ## the loaders on the same files, as benchmarks/results/NAME.json; make docs puts them into docs/data.md
	$(BIN)/python -m pytest benchmarks/bench_data.py --benchmark-enable --benchmark-json benchmarks/results/$(NAME).json

# Needs no set-up: the machine's own Python, with torch, Triton, torchvision, pytest and pytest-benchmark.
GPU_PYTHON ?= $(if $(wildcard $(READY)),$(BIN)/python,$(or $(PYTHON),python3))
gpu: ## on a GPU machine, what needs one, into OUT=folder; GPU_OPTIONS="--plan first" is the most important, in nine minutes
	@test -n "$(OUT)" || { echo "gpu needs OUT=folder for the results" >&2; exit 2; }
	$(GPU_PYTHON) -m benchmarks.gpu_session $(OUT) $(GPU_OPTIONS)

evidence: $(READY) ## every way to merge at equal cost, on DATA=folder, hours; docs/evidence.md. What is done is kept; EVIDENCE_OPTIONS="--parts digits"
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.evidence $(DATA) $(EVIDENCE_OPTIONS)
	$(BIN)/python docs/render.py

coverage: $(READY) ## docs/coverage.md: which torchvision networks merge, and how exactly
	$(BIN)/python -m benchmarks.coverage

coverage-zoo: $(READY) ## the same for timm, transformers, segmentation_models_pytorch, Ultralytics and MONAI, which it installs
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[zoo]"
	$(BIN)/python -m benchmarks.coverage --libraries

docs: $(READY) ## all tables of README.md and docs/ from the committed results
	$(BIN)/python docs/render.py

docs-site: $(READY) ## all pages and the API reference as a website in build/site
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[docs]"
	$(BIN)/python -m mkdocs build --strict

clean: ## removes what was built, the virtual environment too
	rm -rf $(VENV) build dist *.egg-info fastmerge/*.so
