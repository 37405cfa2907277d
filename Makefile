# make demo and make test work from a bare Python 3.11 or later with g++, make and git: everything else goes into .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# The newest torch whose torchvision this project was tested with; any torch >= 2.11 works.
TORCH  ?= torch==2.15.0 torchvision==0.29.2
export OMP_NUM_THREADS ?= 1

# make reliability MINUTES=1, or HOURS=3 ARGUMENTS="--page docs/reliability.md"
MINUTES ?= 5

.PHONY: help setup demo test test-kernels reliability lint format bench docs wheels clean
help:
	@echo "make demo    set up, then compare KeepLoRA with its baselines on the embedded benchmark (runs/demo)"
	@echo "make test    set up, then run all tests but the full proof of the kernels"
	@echo "make test-kernels   that proof: every mutation, every sanitizer, every GPU architecture"
	@echo "make reliability    kills, full disks, hostile files, several writers: a table of what was lost"
	@echo "make lint    formatting, types, import law        make docs   build the documentation"
	@echo "make bench   the CPU microbenchmarks              make clean  remove what was built"
	@echo "make wheels  the source distribution and wheels, checked, in dist"

SOURCES := $(shell find csrc wheels -type f -not -name '*.pyc') setup.py pyproject.toml

$(BIN)/.torch: Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet $(TORCH) ninja
	touch $@

# Two stamps: the demo needs less than the tests do. Both build the extension against the torch of the venv.
$(BIN)/.demo: $(BIN)/.torch $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation -e '.[demo]'
	touch $@

$(BIN)/.dev: $(BIN)/.torch $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation -e '.[dev]'
	touch $@ $(BIN)/.demo

setup: $(BIN)/.dev

demo: $(BIN)/.demo
	$(BIN)/keeplora demo --out runs/demo

# pyproject.toml deselects the tests marked `proof`; tests/csrc/README.md says which they are and what stands in.
test: $(BIN)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q
	@$(BIN)/python tests/csrc/proof.py check || true

# All tests of csrc, none left out. What it writes says that the kernels as they are have passed.
test-kernels: $(BIN)/.dev
	hash=$$($(BIN)/python tests/csrc/proof.py hash) && \
	PYTEST_ADDOPTS= $(BIN)/python -m pytest -n 2 --dist loadfile -q --durations=10 -m "proof or not proof" tests/csrc && \
	$(BIN)/python tests/csrc/proof.py write $$hash

# Tries for five minutes (docs/reliability.md) to lose something; fails where it can.
reliability: $(BIN)/.dev
	$(BIN)/python -m tools.reliability $(if $(HOURS),--hours $(HOURS),--minutes $(MINUTES)) $(ARGUMENTS)

CXX_FILES = $(shell git ls-files 'csrc/*' 'tests/csrc/*' 'bench/*' | grep -E '\.(cpp|h|cuh?)$$')

lint: $(BIN)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(BIN)/.dev
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: $(BIN)/.dev
	$(BIN)/python -m bench.run --device cpu --json build/bench.json

# A warning fails: mkdocs' own, and those of tools/site.py, which also sees to it that --quiet does not hide them.
docs: $(BIN)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site

# With CUDA kernels where nvcc fits torch (the dev environment brings one), a GPU or not; KEEPLORA_CUDA=0 leaves them out.
wheels: $(BIN)/.dev
	rm -rf dist
	$(BIN)/python -m wheels.make dist

clean:
	rm -rf build dist *.egg-info keeplora/*.so keeplora/_built.json $(VENV)
