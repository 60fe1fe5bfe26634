# Both commands work by themselves on a fresh machine: they make .venv and install what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed

.PHONY: demo test test-gpu test-cuda-compile test-cuda-emulation test-vllm check-wheel lint clean

demo: $(STAMP)
	$(BIN)/anybits demo

test: $(STAMP)
	$(BIN)/python -m pytest

# On a machine with an NVIDIA GPU: the whole matrix, graphs, streams, torch.compile.
test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu tests/test_kernels_cuda.py tests/test_static_decode_cuda.py

# Without a GPU: every kernel variant for every architecture (minutes), and the whole matrix on the emulator (minutes).
test-cuda-compile: $(STAMP)
	ANYBITS_ALL_VARIANTS=1 $(BIN)/python -m pytest tests/test_cuda_compile.py

test-cuda-emulation: $(STAMP)
	ANYBITS_ALL_VARIANTS=1 $(BIN)/python -m pytest tests/test_cuda_emulation.py tests/test_cuda_races.py

test-vllm: $(VLLM_STAMP)
	$(VLLM_VENV)/bin/python -m pytest tests/vllm_plugin

# The wheel, where there is no compiler (minutes: torch is installed again).
check-wheel:
	scripts/check_wheel.sh

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

# An environment of its own: vLLM's pins are not ours. constraints-vllm.txt lists every package, so that pip resolves
# nothing: it would add codecs of images and audio that text models never load.
$(VLLM_STAMP): pyproject.toml constraints-vllm.txt
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --constraint constraints-vllm.txt torch
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --requirement constraints-vllm.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --editable .
	touch $(VLLM_STAMP)

clean:
	rm -rf $(VENV) $(VLLM_VENV) demo-out build dist
