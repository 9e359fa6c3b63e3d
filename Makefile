# make demo | test | check-arm: each sets up .venv by itself.  PYTHON=python3.12 picks the interpreter, ARGS="..." goes to the demo or to pytest,
# SLOW=1 adds the slow tests.
PYTHON ?= python3
TORCH_INDEX := https://download.pytorch.org/whl/cpu
VENV := .venv
PY := $(VENV)/bin/python
LOCK := $(if $(shell command -v flock),flock Makefile)
C_FILES = $(wildcard csrc/*.h csrc/*/*.[ch] tests/c/*.[ch])
TEST_PACKAGES := transformers accelerate trl peft datasets gguf onebitllms pytest hypothesis pytest-run-parallel ruff mypy clang-format
PY_FILES = setup.py onebit_ext tests

.PHONY: build demo test check-arm lint format clean
.DEFAULT_GOAL := build

build: $(VENV)/.demo
	@$(LOCK) $(PY) setup.py -q build_ext --inplace

demo: build
	$(PY) -m onebit_ext demo $(ARGS)

test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest $(if $(SLOW),,-m "not slow") $(ARGS)

check-arm: $(VENV)/.test build
	$(call need,command -v aarch64-linux-gnu-gcc,a compiler for AArch64,gcc-aarch64-linux-gnu libc6-dev-arm64-cross)
	$(call need,command -v qemu-aarch64,an emulator of AArch64,qemu-user)
	$(PY) -m pytest tests/c/test_isa_check.py -k aarch64

lint: export ONEBIT_WERROR = 1
lint: $(VENV)/.test build
	$(VENV)/bin/ruff check $(PY_FILES)
	$(VENV)/bin/ruff format --check $(PY_FILES)
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(C_FILES)

format: $(VENV)/.test
	$(VENV)/bin/ruff check --fix $(PY_FILES)
	$(VENV)/bin/ruff format $(PY_FILES)
	$(VENV)/bin/clang-format -i $(C_FILES)

clean:
	rm -rf build dist *.egg-info onebit_ext/*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis

# need(test command, what is missing, Debian package)
need = @$(1) >/dev/null 2>&1 || { echo "onebit_ext needs $(2); on Debian or Ubuntu: apt install $(3)" >&2; exit 1; }
COMPILER := import sysconfig; print(sysconfig.get_config_var('CC').split()[0])
VERSION := import sys; sys.exit(sys.hexversion < 0x030b0000)
INCLUDE := import os; import sys; import sysconfig; sys.exit(not os.path.exists(sysconfig.get_path('include') + '/Python.h'))

$(VENV)/bin/python:
	$(call need,$(PYTHON) -c "$(VERSION)",Python 3.11 or newer as '$(PYTHON)' or PYTHON=...,python3)
	$(call need,$(PYTHON) -c "import ensurepip; import venv",Python's venv and ensurepip modules,python3-venv)
	$(call need,$(PYTHON) -c "$(INCLUDE)",Python's C headers (Python.h),python3-dev)
	$(call need,command -v $${CC:-$$($(PYTHON) -c "$(COMPILER)")},a C compiler,gcc libc6-dev)
	$(PYTHON) -m venv $(VENV)

# pip's --extra-index-url only if it answers: PyPI's own torch for x86-64 Linux brings gigabytes of CUDA along.
install = index=$$($(PY) -c "import urllib.request as u; u.urlopen('$(TORCH_INDEX)/torch/', timeout=10)" \
	  2>/dev/null && echo --extra-index-url $(TORCH_INDEX)); \
	$(LOCK) $(PY) -m pip install -q -c constraints.txt $$index $(1)

$(VENV)/.demo: constraints.txt pyproject.toml | $(VENV)/bin/python
	@echo "Installing into $(VENV) what constraints.txt pins (numpy, torch, ...)"
	@$(call install,numpy torch safetensors ml_dtypes rich matplotlib setuptools)
	@ONEBIT_PURE=1 $(LOCK) $(PY) -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.test: constraints.txt pyproject.toml $(VENV)/.demo
	@$(call install,$(TEST_PACKAGES))
	@touch $@
