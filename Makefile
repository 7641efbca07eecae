# `make demo` and `make test` do all their own set-up, in a virtual environment of their own.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
AUDIO ?=
TESTS ?= tests

SOURCES := $(shell find csrc -name '*.[ch]' -o -name '*.cu') setup.py pyproject.toml $(CONSTRAINTS)
BIN := $(VENV)/bin

.PHONY: demo test test-floor sanitize sanitize-cuda ptx gpu gpu-ready gpu-tests gpu-ops gpu-steps gpu-generate gpu-memory \
	gpu-sanitize bench engines lint coverage docs docs-serve wheels clean

demo: $(VENV)/.demo,cli
	$(BIN)/whisperkv demo $(AUDIO)

# JOBS=1 for one test at a time. Kernels for one GPU and PTX are enough to test that they compile.
JOBS ?= 2
demo test coverage docs bench sanitize sanitize-cuda: export WHISPERKV_ARCHS ?= 80
test: $(VENV)/.test
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal $(TESTS)

# Only what touches transformers.
FLOOR = adoption capture patch cache cross_cache graphs generate searches steps ctranslate2 config trim merge features \
	prune prune_families prune_docs pruners lowrank lowrank_training lowrank_lessons
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

# On a machine with a GPU, by its own Python: torch, transformers and pytest are enough, and no package index is asked.
# The kernels are built in place if they are not there (whisperkv/*.abi3.so). `make gpu` runs all; each part takes less
# than eight minutes. Results go to GPU_OUT. WEIGHTS="tiny.en=FOLDER" for the real weights of a faster-whisper folder,
# SPEECH=FILE for samples saved by NumPy where soundfile is missing, GPU_TESTS for other tests.
GPU_PYTHON ?= python3
GPU_OUT ?= benchmarks/results/gpu
WEIGHTS ?=
SPEECH ?=
GPU_TESTS ?= $(GPU_FILES:%=tests/test_%.py)
GPU_FILES = ops cross_ops prune_ops graphs capture generate
GPU_TABLES = gpu-ops gpu-steps gpu-generate gpu-memory
IN_TREE = PYTHONPATH="$(CURDIR):$$PYTHONPATH"
IN_TIME = timeout --signal=INT --kill-after=20 475

gpu:
	$(MAKE) --keep-going gpu-tests $(GPU_TABLES)

gpu-ready:
	$(IN_TREE) $(GPU_PYTHON) benchmarks/gpu_ready.py

gpu-tests: export WHISPERKV_TEST_DEVICE = cuda
gpu-tests: export WHISPERKV_TINY_EN ?= $(patsubst tiny.en=%,%,$(filter tiny.en=%,$(WEIGHTS)))
gpu-tests: export WHISPERKV_SPEECH ?= $(SPEECH)
gpu-tests: gpu-ready
	$(IN_TREE) $(IN_TIME) $(GPU_PYTHON) -m pytest -q -p no:cacheprovider $(GPU_TESTS)

$(GPU_TABLES): gpu-%: gpu-ready
	$(IN_TREE) $(IN_TIME) $(GPU_PYTHON) benchmarks/gpu.py --tables $* --minutes 6 --results $(GPU_OUT) \
		$(if $(WEIGHTS),--weights $(WEIGHTS)) $(if $(SPEECH),--speech $(SPEECH))

# compute-sanitizer on the kernels. Torch's pool would hide what is read past a tensor.
CHECK = WHISPERKV_TEST_DEVICE=cuda PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1
gpu-sanitize: gpu-ready
	$(CHECK) --tool memcheck $(GPU_PYTHON) -m pytest -q -x -k "TestValues or TestOfCuda" tests/test_*ops.py
	$(CHECK) --tool racecheck $(GPU_PYTHON) -m pytest -q -x -k "TestValues and (shapes or latent or several)" \
		tests/test_*ops.py

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/run.py

# The engines that whisperkv is measured against, each in an environment of its own, and the weights as they read them.
# Then: .venv/bin/python benchmarks/engines.py --help. MODELS="tiny.en base small large-v3-turbo": the last two at random.
ENGINES := .venv-engines
MODELS ?= tiny.en base
engines: $(VENV)/.bench $(ENGINES)/faster-whisper $(ENGINES)/whispercpp $(ENGINES)/onnx $(ENGINES)/openvino
	$(BIN)/python benchmarks/workers/prepare.py --models $(MODELS)

# Those that cannot be had here are left out of the table.
$(ENGINES)/faster-whisper: PACKAGES = faster-whisper
$(ENGINES)/whispercpp: PACKAGES = --no-binary pywhispercpp pywhispercpp
$(ENGINES)/whispercpp: export CMAKE_ARGS = -DGGML_NATIVE=ON
$(ENGINES)/onnx: PACKAGES = -c $(CONSTRAINTS) torch optimum-onnx[onnxruntime] ctranslate2
$(ENGINES)/openvino: PACKAGES = -c $(CONSTRAINTS) torch optimum-intel[openvino] openvino-genai
$(ENGINES)/%:
	$(PYTHON) -m venv $@-making
	-$@-making/bin/python -m pip install -q --disable-pip-version-check $(PACKAGES)
	-$@-making/bin/python -m pip uninstall -q -y torchvision  # built for another torch, and not needed
	mv $@-making $@

# What CI checks beside the tests. The formatters' versions stand in constraints.txt, as each formats differently.
LINT := .venv-lint
LINTERS := ruff mypy clang-format check-manifest numpy
FORMATTED := $(shell find csrc tests -name '*.[ch]' -o -name '*.cu' -o -name '*.cpp')
lint: $(LINT)/.ready
	$(LINT)/bin/ruff check .
	$(LINT)/bin/ruff format --check .
	$(LINT)/bin/mypy
	$(LINT)/bin/check-manifest
	$(LINT)/bin/clang-format --dry-run -Werror $(FORMATTED)

$(LINT)/.ready: Makefile $(CONSTRAINTS)
	$(PYTHON) -m venv $(LINT)
	$(LINT)/bin/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) $(LINTERS)
	touch $@

# The tests, and which lines of whisperkv/ they run: a table, and htmlcov/index.html.
coverage: $(VENV)/.dev
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal --cov --cov-report=term --cov-report=html $(TESTS)

# The site, in site/. A link that leads nowhere is an error.
docs: $(VENV)/.docs
	$(BIN)/mkdocs build -q --strict

docs-serve: $(VENV)/.docs
	$(BIN)/mkdocs serve

# sdist and wheel in dist/, the repaired wheel in dist/manylinux/, checked and tried in environments of their own.
wheels:
	PYTHON=$(PYTHON) CONSTRAINTS=$(CONSTRAINTS) sh .ci/wheels

# One stamp for some extras: demo,cli, test, bench, docs, dev. The package is installed in place, so Python changes need no new install.
$(VENV)/.%: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e '.[$*]'
	-test $* != test || $(BIN)/python -m pip install -q --disable-pip-version-check --no-deps openai-whisper  # its writers
	touch $@

clean:
	rm -rf build dist site htmlcov .coverage* whisperkv-demo *.egg-info whisperkv/*.so .venv .venv-floor .venv-engines .venv-lint .venv-wheels
