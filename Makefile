# Two commands do everything: `make demo` and `make test`. `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

.PHONY: help install demo perf live adapt tokens original test test-unit test-triton test-faults soak test-slow package lint format clean
.DEFAULT_GOAL := help

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

# Python before 3.11.11 and 3.12.8 writes this folder's path into the activate scripts so that a
# shell runs what stands in it (CVE-2024-9287).
define QUOTE_IN_ACTIVATE
import os, pathlib, shlex
path = os.path.abspath("$(VENV)")
for name in ("activate", "activate.csh", "activate.fish"):
    script = pathlib.Path("$(VENV)/bin", name)
    text = script.read_text("utf-8", "surrogateescape").replace(f'"{path}"', shlex.quote(path))
    script.write_text(text, "utf-8", "surrogateescape")
endef
export QUOTE_IN_ACTIVATE

install: $(INSTALLED)  ## create .venv with everything, Triton and perf_analyzer included

$(INSTALLED): requirements.txt requirements-wheels.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 12) \
	  else "error: Python %d.%d found, 3.10 to 3.12 needed; run make PYTHON=python3.11" % v)'
	@$(PYTHON) -c 'import os, sys; sys.exit("error: Python makes no virtual environment below a path with " \
	  "a colon; move this folder to another" if ":" in os.getcwd() else None)'
	$(PYTHON) -m venv $(VENV)
	@$(PYTHON) -c "$$QUOTE_IN_ACTIVATE"
	$(PY) -m pip install --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	$(PY) -m pip install --disable-pip-version-check --no-deps -r requirements-wheels.txt
	$(PY) -m perf install
	@touch $@

# PLAN=1 serves what the planner chooses, at most RISK (default 0.05) of the answers changed.
# MODEL=static-vit does it all with a toy of random weights.
demo: $(INSTALLED)  ## export, calibrate, serve, query and measure; PLAN=1 RISK=0.02 to plan
	$(PY) -m demo$(if $(MODEL), --model $(MODEL))$(if $(filter-out 0,$(PLAN)), --plan)$(if $(RISK), --risk $(RISK))

DEMO := build/demo
perf: $(INSTALLED)  ## what the cascade costs beside its alternatives, in four minutes
	$(PY) -m demo --prepare
	$(PY) -m perf run --images sample --onnx $(DEMO)/onnx \
	  --calibration $(DEMO)/calibration.json --repository $(DEMO)/model_repository

live: $(INSTALLED)  ## serve without a calibration: a stream of pictures certifies a threshold, then changes
	$(PY) -m demo live$(if $(RISK), --risk $(RISK))$(if $(AUDITED), --audited $(AUDITED))

adapt: $(INSTALLED)  ## train cheap rungs, without labels, on varied pictures; a table of what it is worth
	$(PY) -m demo adapt

tokens: $(INSTALLED)  ## five ways to spend half of the cost, token removal among them, on varied pictures
	$(PY) -m demo tokens

ORIGINAL := build/original
original: $(INSTALLED)  ## the tables of the research script this began with, measured here
	$(PY) -m export rungs --model static-vit --out $(ORIGINAL)/onnx
	$(PY) -m calibration collect --images sample --seed 31 --limit 1000 \
	  --onnx $(ORIGINAL)/onnx --out $(ORIGINAL)/outputs.json
	$(PY) -m calibration fit --escalation-rate 0.095 --onnx $(ORIGINAL)/onnx \
	  --outputs $(ORIGINAL)/outputs.json --out $(ORIGINAL)/calibration.json
	$(PY) -m export repository --onnx $(ORIGINAL)/onnx \
	  --calibration $(ORIGINAL)/calibration.json --out $(ORIGINAL)/model_repository \
	  --client-parameters any
	$(PY) -m perf original --build $(ORIGINAL)

test: test-unit test-triton  ## unit tests, then tests against a real tritonserver

# A file's fixtures are made once, by the process it goes to; tests/conftest.py has long files go first.
SIDE_BY_SIDE := --dist loadfile --no-loadscope-reorder
# One process a core, each with one thread.
test-unit: $(INSTALLED)  ## some minutes on two cores, fewer where its exports are remembered
	OMP_NUM_THREADS=1 $(PY) -m pytest tests/unit -n auto $(SIDE_BY_SIDE)

# What measures the machine itself has it alone; the others, which
# mostly wait for servers of their own, run three at a time.
test-triton: $(INSTALLED)  ## against a real tritonserver
	$(PY) -m pytest tests/triton -m alone
	$(PY) -m pytest tests/triton -m "not alone" -n 3 $(SIDE_BY_SIDE)

test-faults: $(INSTALLED)  ## half an hour: kill, hang, starve and flood a server under load; a table of what happened
	$(PY) -m pytest tests/faults --log-cli-level=INFO

test-slow: $(INSTALLED)  ## two minutes: exports of real weights, the package
	$(PY) -m pytest tests/slow --ignore tests/slow/test_soak.py

soak: $(INSTALLED)  ## fifteen minutes, or SOAK_MINUTES=N, of good and bad requests; memory stays
	$(PY) -m pytest tests/slow/test_soak.py --log-cli-level=INFO

package: $(INSTALLED)  ## a minute: build wheel and sdist into build/dist, install and try them elsewhere
	$(PY) -m pytest tests/slow/test_package.py

lint: $(INSTALLED)  ## ruff and mypy, as pre-commit and CI run them
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(INSTALLED)  ## rewrite the files as lint wants them
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:  ## remove build/ and .venv/
	rm -rf build $(VENV)
