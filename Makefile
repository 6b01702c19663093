PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: quickstart test coverage lint docs wheel bench clean

## Train a small encoder on the built-in images and score it against its untrained start.
quickstart: .venv/installed
	rm -rf runs/quickstart
	$(BIN)/ijepa train synthetic --config own-images-cpu --steps 250 --data.cache memory --run runs/quickstart
	$(BIN)/ijepa evaluate runs/quickstart --train synthetic --val synthetic --baselines
	$(BIN)/ijepa report runs/quickstart

## Lint, types and tests, these on up to four cores.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4

## The tests, with a list of the lines that no test runs. Not part of `test`, because tracing takes 1.5 times as long.
coverage: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --cov --cov-report=term:skip-covered

lint: .venv/installed-dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

## The site, written to docs/_build/html. Warnings are errors.
docs: .venv/installed-dev
	$(BIN)/sphinx-build -M html docs docs/_build --quiet --fresh-env --fail-on-warning --keep-going

## The wheel and the source archive in dist/, and the wheel used in an environment of its own.
wheel: .venv/installed-dev
	.ci/wheel

## Every speed table, written to benchmarks/results.
bench: .venv/installed-dev
	$(BIN)/ijepa benchmark packing --csv
	$(BIN)/ijepa benchmark loader --csv
	$(BIN)/ijepa benchmark attention --csv
	$(BIN)/ijepa benchmark merging --csv
	$(BIN)/ijepa benchmark step --csv
	$(BIN)/ijepa benchmark embed --csv

clean:
	rm -rf .venv build dist docs/_build runs .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -prune -exec rm -rf {} + -o -name '*.egg-info' -prune -exec rm -rf {} +

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) -e '.[plots]'
	touch $@

.venv/installed-dev: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) 'pip>=25.1'  # older ones have no --group
	$(PIP) -e . --group dev
	touch $@ .venv/installed
