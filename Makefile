# `make demo` and `make test` do all their own set-up, in a virtual environment of their own.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
AUDIO ?=
TESTS ?= tests

SOURCES := $(shell find csrc -name '*.[ch]' -o -name '*.cu') setup.py pyproject.toml $(CONSTRAINTS)
BIN := $(VENV)/bin

.PHONY: demo test test-floor sanitize sanitize-cuda ptx gpu gpu-sanitize bench clean

demo: $(VENV)/.demo
	$(BIN)/python -m whisperkv.demo $(AUDIO)

# JOBS=1 for one test at a time.
JOBS ?= 2
test: $(VENV)/.test
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal $(TESTS)

# Only what touches transformers.
FLOOR = patch cache cross_cache graphs generate ctranslate2 config trim
test-floor:
	WHISPERKV_CUDA=off $(MAKE) test VENV=.venv-floor CONSTRAINTS=constraints-floor.txt TESTS="$(FLOOR:%=tests/test_%.py)"

sanitize: $(VENV)/.test
	PYTHON=$(BIN)/python sh tests/sanitize.sh

# The kernels for CUDA, on the CPU, in both orders of threads.
sanitize-cuda: $(VENV)/.test
	PYTHON=$(BIN)/python sh tests/sanitize.sh cuda
	SHIM_REVERSE=1 PYTHON=$(BIN)/python sh tests/sanitize.sh cuda

# What nvcc makes of the kernels for CUDA, in an interpreter: all cases, not only the short ones of `make test`.
ptx: $(VENV)/.test
	WHISPERKV_PTX=all $(BIN)/python -m pytest -q tests/test_ptx.py

# On a machine with a GPU and nvcc: the tests, those of the ops, of graphs and of generate() on CUDA, then the benchmarks.
# WEIGHTS="tiny.en=FOLDER" for the real weights of a faster-whisper folder; GPU_TESTS for fewer tests.
GPU_TESTS = $(TESTS)
gpu: $(VENV)/.test $(VENV)/.bench
	WHISPERKV_TEST_DEVICE=cuda $(BIN)/python -m pytest -q $(GPU_TESTS)
	$(BIN)/python benchmarks/gpu.py $(if $(WEIGHTS),--weights $(WEIGHTS))

# compute-sanitizer on the kernels. Torch's pool would hide what is read past a tensor.
CHECK = WHISPERKV_TEST_DEVICE=cuda PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1
gpu-sanitize: $(VENV)/.test
	$(CHECK) --tool memcheck $(BIN)/python -m pytest -q -x -k "TestValues or TestOfCuda" tests/test_*ops.py
	$(CHECK) --tool racecheck $(BIN)/python -m pytest -q -x -k "TestValues and (shapes or latent or several)" \
		tests/test_*ops.py

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/run.py

# One stamp an extra: demo, test, bench. The package is installed in place, so Python changes need no new install.
$(VENV)/.%: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e '.[$*]'
	touch $@

clean:
	rm -rf build dist *.egg-info whisperkv/*.so .venv .venv-floor
