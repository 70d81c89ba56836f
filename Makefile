.DEFAULT_GOAL := help
.PHONY: help install demo test test-full test-gpu lint format docs sbom clean
PYTHON ?= python3
BIN := .venv/bin
# a worker for each core, of one thread each; a test that a worker is done with is nobody else's
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

help: ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

install: .venv/installed ## .venv with blemish in editable mode

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v < (3, 14) or sys.exit("blemish needs Python 3.11 to 3.13, this is %d.%d; choose with make PYTHON=python3.12" % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: .venv/installed ## train PaDiM on the embedded textures and look at the result
	$(BIN)/python tools/train.py model=padim data=textures recipe=bundled

test: lint ## lint and the tests that guard correctness, some minutes on two cores
	$(PYTEST)

test-full: .venv/installed-dev ## all other tests: kills, fuzzing, sweeps, DDP, notebooks, wheel, browser
	$(PYTEST) -m slow

test-gpu: .venv/installed-dev ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m '' tests/test_cuda.py tests/run/test_resume.py

lint: .venv/installed-dev ## style only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed-dev ## mend the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/installed-docs ## the documentation site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

.venv/installed-docs: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@

SBOM ?= build/sbom.json

sbom: .venv/installed-dev ## what .venv consists of, tools included, as CycloneDX in build/sbom.json
	mkdir -p $(dir $(SBOM))
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --mc-type application --output-reproducible -o $(SBOM) $(BIN)/python

clean: ## remove the virtual environment and caches; runs stay
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
