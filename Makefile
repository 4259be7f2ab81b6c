# Needs Python 3.11 or newer and make. Everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
TORCH := torch==2.13.0
BIN := $(VENV)/bin
# Python compiles what it imports, once. pip would compile every file of every package.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help demo test gpu stress coverage lint format docs lock audit release clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/make \1\t\2/p' Makefile | expand -t 16

# The pinned torch first: the index's plain release, or a local CPU wheel where there is one. Named again, or torchvision
# would bring the newest torch of its own.
$(VENV)/base: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "FlowMo needs Python 3.11 or newer, not " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) $(TORCH)
	$(PIP_INSTALL) --editable . $(TORCH)
	touch $@

$(VENV)/dev: $(VENV)/base
	$(PIP_INSTALL) --editable '.[dev]' $(TORCH)
	touch $@

demo: $(VENV)/base  ## real photographs to a few hundred bytes of token ids and back
	$(BIN)/flowmo reconstruct examples/pictures/*.jpg --fit crop --output demo --grid demo/all.png --force

# A process a core with a thread each: the tests' own processes and networks are small. They compare with the CPU's
# results, so GPUs are hidden; tests/gpu are for those.
TEST_ENVIRONMENT := OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
test: $(VENV)/dev lint  ## style, types and the test suite
	$(TEST_ENVIRONMENT) $(BIN)/python -m pytest -n auto --dist worksteal --ignore=tests/stress

gpu: $(VENV)/dev  ## the tests that need a CUDA device
	$(BIN)/python -m pytest tests/gpu

stress: $(VENV)/dev  ## kills, load, fuzzing, studies and a whole recipe
	$(TEST_ENVIRONMENT) $(BIN)/python -m pytest -n auto tests/stress

coverage: $(VENV)/dev  ## lines of src/ that no test runs, processes that tests start included
	$(BIN)/python -m coverage erase
	$(TEST_ENVIRONMENT) $(BIN)/python -m coverage run -m pytest -n auto
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --show-missing --skip-covered --fail-under=90

lint: $(VENV)/dev  ## style, and types strict but for what pyproject.toml names
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev  ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(VENV)/dev  ## exact versions with hashes, see docs/licences.md
	$(PIP_INSTALL) uv
	(sed -n '/^#/p' requirements-dev.txt; echo "$(TORCH)" | $(BIN)/uv pip compile pyproject.toml --extra dev \
		--constraint - --generate-hashes --no-emit-index-url --no-header --no-annotate --python-version 3.11 \
		--python-platform x86_64-manylinux_2_28) > requirements-dev.new
	mv requirements-dev.new requirements-dev.txt

audit: $(VENV)/base  ## known vulnerabilities of what is locked, where they can be looked up
	-$(PIP_INSTALL) pip-audit
	$(BIN)/python tests/audit.py

docs: $(VENV)/dev  ## the site, in docs/_build
	$(BIN)/sphinx-build -W --keep-going -q docs docs/_build

PYTHONS ?= python3.11 python3.12 python3.13
release:  ## wheel and source archive in dist/, tried in clean environments of PYTHONS
	$(PYTHON) tests/release.py $(TORCH) $(PYTHONS)

clean:  ## remove the environment and everything that was built
	rm -rf $(VENV) demo docs/_build build dist src/*.egg-info
