VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

unexport PYTHONDONTWRITEBYTECODE # each process of the tests would compile the package anew

.PHONY: demo test coverage docs bench clean

demo: $(VENV)/.installed  ## train, overfit and cure an MLP on digits; writes runs/demo
	$(BIN)/tikhon demo

test: $(VENV)/.dev  ## the whole quick suite
	$(BIN)/python -m pytest -n 2 --dist worksteal

coverage: $(VENV)/.dev  ## the quick suite with its coverage, which has a floor
	$(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=term --cov-fail-under=90

docs: $(VENV)/.dev  ## the documentation, in docs/_build
	$(BIN)/sphinx-build -W -b html docs docs/_build

bench: $(VENV)/.dev  ## the quick form of every benchmark
	for script in $$(grep -l '"--quick"' benchmarks/*.py); do $(BIN)/python $$script --quick || exit 1; done

clean:
	rm -rf $(VENV) build dist docs/_build runs

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@ $(VENV)/.installed
