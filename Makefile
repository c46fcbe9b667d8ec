# Each target sets up what it needs first (tools/setup.sh), once, and skips that while nothing changed.
#
#   make demo    sample data -> trained model -> streamlines -> scores and pictures in results/demo/
#   make lab     JupyterLab on the notebooks, of which the tutorials are copied to results/tutorials/
#   make test    everything that can be checked; FULL=1 adds the long repetitions
#   make bench   the benchmarks, as ratios to what the hardware allows
#   make docs    HTML pages in _docs/html
#
# Variables, on the command line or in the environment:
#   PYTHON       the interpreter that makes .venv, 3.11 or newer
#   TORCH_INDEX  where torch comes from: the CPU wheels by default; https://download.pytorch.org/whl/cu130 for that
#                CUDA; empty for whatever PyPI has for this machine
#   ARGS         handed on, as in: make demo ARGS="--quick --out results/quick"

PYTHON ?= python3
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
ARGS ?=
export PYTHON TORCH_INDEX

# Real data for tests and tutorials: the folder named by TRACTKIT_DATA, or this one where it exists.
ifeq ($(origin TRACTKIT_DATA),undefined)
ifneq ($(wildcard ../shared/data/.),)
export TRACTKIT_DATA := $(abspath ../shared/data)
endif
endif

# Vulkan wants a private folder by this name; machines without a desktop session do not set it.
export XDG_RUNTIME_DIR ?= $(CURDIR)/.venv/run

BIN := .venv/bin

.PHONY: help demo lab test bench docs
help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile

demo:
	@tools/setup.sh demo
	@$(BIN)/python -m tractkit demo $(ARGS)

lab:
	@tools/setup.sh lab
	@$(BIN)/python -m tractkit lab --folder results/tutorials -- --notebook-dir=. \
		$(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

test:
	@tools/setup.sh test
	@$(BIN)/python tools/test.py $(ARGS)

bench:
	@tools/setup.sh bench
	@$(BIN)/python -m benchmarks $(ARGS)

docs:
	@tools/setup.sh docs
	@$(BIN)/python tools/docs/build.py $(ARGS)
