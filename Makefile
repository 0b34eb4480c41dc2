# The torch of the development environment; pinned here and nowhere else.
TORCH ?= 2.13.0
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(shell find csrc -type f)
COMMIT := $(shell git rev-parse --short HEAD 2>/dev/null || echo uncommitted)

.PHONY: demo test bench bench-compare instructions performance gpu-check lint clean

demo: $(VENV)/.demo
	$(BIN)/acgkd-fast demo --out runs/demo-$$(date +%Y%m%d-%H%M%S)

# One process per core with one thread each: threads of two processes would wait for each other.
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile

bench: $(VENV)/.bench
	$(BIN)/python bench/run.py --out bench/results/$(COMMIT)

# What became slower since BASE (a commit with results, or a file), relative to peers measured in the same run.
bench-compare: $(VENV)/.bench
	@test -n "$(BASE)" || { echo "bench-compare: expected BASE=commit or file, got none" >&2; exit 2; }
	$(BIN)/python bench/compare.py $(BASE) $(or $(NEW),$(COMMIT))

instructions: $(VENV)/.bench
	$(BIN)/python bench/instructions.py --out bench/results/instructions.json

# docs/performance.md and its pictures, from what bench/results holds.
performance: $(VENV)/.bench
	$(BIN)/python bench/performance.py

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/mypy

# Uses the python that is there: no virtual environment, no network.
gpu-check:
	@test -n "$(RESULTS)" || { echo "gpu-check: expected RESULTS=folder, got none" >&2; exit 2; }
	mkdir -p "$(RESULTS)"
	ACGKD_FAST_BUILD=cuda $(PYTHON) -m pip install --no-build-isolation --no-deps .
	$(PYTHON) tests/gpu_check.py "$(abspath $(RESULTS))"

$(VENV)/.torch: Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q torch==$(TORCH) "setuptools>=70.1" ninja
	touch $@

$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install -q --no-build-isolation -e .
	touch $@

# Asking for the extras of what is installed already adds them without another build.
$(VENV)/.demo: $(VENV)/.built
	$(BIN)/python -m pip install -q "acgkd-fast[pyg,report]"
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(BIN)/python -m pip install -q "acgkd-fast[test,triton]"
	touch $@

$(VENV)/.bench: $(VENV)/.test
	$(BIN)/python -m pip install -q "acgkd-fast[bench]"
	touch $@

$(VENV)/.lint: $(VENV)/.built
	$(BIN)/python -m pip install -q "acgkd-fast[lint]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info acgkd_fast/_C*.so acgkd_fast/_build_info.json
