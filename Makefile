# Both commands work by themselves on a fresh machine: they make .venv and install what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-gpu test-cuda-compile test-cuda-emulation lint clean

demo: $(STAMP)
	$(BIN)/anybits demo

test: $(STAMP)
	$(BIN)/python -m pytest

# On a machine with an NVIDIA GPU: the whole matrix, graphs, streams, torch.compile.
test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu tests/test_kernels_cuda.py

# Without a GPU: every kernel variant for every architecture (minutes), and the whole matrix on the emulator (minutes).
test-cuda-compile: $(STAMP)
	ANYBITS_ALL_VARIANTS=1 $(BIN)/python -m pytest tests/test_cuda_compile.py

test-cuda-emulation: $(STAMP)
	ANYBITS_ALL_VARIANTS=1 $(BIN)/python -m pytest tests/test_cuda_emulation.py

lint: $(STAMP)
	$(BIN)/ruff check src tests scripts benchmarks
	$(BIN)/ruff format --check src tests scripts benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

# torch is installed by its exact version first: a looser requirement could choose a build with CUDA.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "anybits needs Python 3.11 or newer: set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) demo-out build dist
