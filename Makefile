# Everything runs in .venv, which the first target makes. CONSTRAINTS pins the tested torch build.
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: test check demo bench bench-peer bench-quality clean

test: check
	$(BIN)/python -m pytest -n 2

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: $(VENV)/demo-installed
	$(BIN)/python -m demo

bench: $(VENV)/installed
	$(BIN)/python benchmarks/speed.py

# mergekit in an environment of its own, to be measured against: make bench MERGEKIT=...
bench-peer: $(VENV)-mergekit/installed
	MERGEKIT=$(VENV)-mergekit/bin/python $(MAKE) bench

# eight text tasks, an expert for each, every merge: the fixture and the lines are kept
bench-quality: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.quality

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[dev]'
	touch $@

$(VENV)/demo-installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[demo]'
	touch $@

$(VENV)-mergekit/installed:
	$(PYTHON) -m venv $(VENV)-mergekit
	$(VENV)-mergekit/bin/python -m pip install --quiet -c constraints.txt torch
	$(VENV)-mergekit/bin/python -m pip install --quiet -c constraints.txt mergekit==0.1.5
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-mergekit build *.egg-info
