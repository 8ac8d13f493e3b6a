# Two commands: `make train` and `make test`. Everything is installed into .venv, from constraints.txt.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Every extra resolves against the same pins, so the sets can be installed one after another.
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
ARGS   ?=

.PHONY: train test check gpu-test exe exe-test clean

train: $(VENV)/.installed
	$(BIN)/eco_train @presets/quickstart_cpu.txt $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto $(ARGS)

check: $(VENV)/.installed-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python benchmarks/render.py --check

gpu-test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m gpu $(ARGS)

# The program in one folder, without Python: docs/executable.md.
exe: $(VENV)/.installed-exe
	$(BIN)/python -m PyInstaller --noconfirm --log-level WARN --distpath dist --workpath build/exe packaging/eco_train.spec

exe-test: $(VENV)/.installed-exe
	ECO_TRAIN_EXE=dist/eco_train $(BIN)/python -m pytest tests/packaging $(ARGS)

clean:
	rm -rf .runtime_cache .data_cache build *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "eco-llm needs Python 3.11 or newer; set PYTHON="'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e .
	touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[test]'
	touch $@

$(VENV)/.installed-exe: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[exe,test]'
	touch $@

$(VENV)/.installed-check: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[check,test]'
	touch $@
