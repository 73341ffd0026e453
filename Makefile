# make run       set up .venv and run the notebooks      PAPERS="nacl ..." SIZE=smoke|laptop|gpu JOBS=2 OUT=build/runs
# make test      the whole check                         STEPS="lint unit ..." for a part of it
# make lab       open JupyterLab on the index
# make bench     the benchmarks                          BENCH="nacl ..." for some
# make report    the site: gallery, notebooks, verdicts, sweeps, benchmarks   OUT=build/runs
.DEFAULT_GOAL := help
.PHONY: help run test lab bench report setup doctor clean
SHELL := /bin/bash

PAPERS ?=
SIZE ?= laptop
JOBS ?= 1
OUT ?= build/runs
STEPS ?=
BENCH ?=
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.labkit-stamp

# The first interpreter of at least 3.11 that really starts. PYTHON=... chooses another.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	if $$name -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	echo $$name; break; fi; done)

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "labkit needs Python 3.11 or newer with venv; set PYTHON=/path/to/python" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

setup: $(STAMP)

run: $(STAMP)
	$(BIN)/labkit run $(PAPERS) --size $(SIZE) --jobs $(JOBS) --out $(OUT) --report

test: $(STAMP)
	$(BIN)/python -m labkit.lab.check $(STEPS)

lab: $(STAMP)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/jupyter lab \
		$(if $(wildcard notebooks/index.ipynb),notebooks/index.ipynb,notebooks)

bench: $(STAMP)
	$(BIN)/labkit bench $(if $(BENCH),$(BENCH),--all)

report: $(STAMP)
	$(BIN)/labkit report $(if $(filter-out build/runs,$(OUT)),--out $(OUT))

doctor: $(STAMP)
	$(BIN)/labkit doctor

clean:
	rm -rf build dist
