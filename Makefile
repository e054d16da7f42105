# Two commands: `make train` and `make test`. Both set up what is missing in .venv; everything else is here for daily work.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
TRITON := triton==3.7.1
NATIVE := setup.py $(wildcard csrc/*.h csrc/*.cpp csrc/*/*)
PYTEST := $(BIN)/python -m pytest
ARGS ?=

.PHONY: train test lint types check bench docs format clean

train: $(VENV)/.train
	$(BIN)/ppg-fast train --overwrite $(ARGS)

test: lint types check

check: $(VENV)/.dev
	$(PYTEST) -n 2 --dist worksteal -q $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*' 'tests/*.h' 'tests/*.cpp')

types: $(VENV)/.dev
	$(BIN)/pyright

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*' 'tests/*.h' 'tests/*.cpp')

bench: $(VENV)/.dev
	$(BIN)/ppg-fast bench $(ARGS)

docs: $(VENV)/.dev
	$(BIN)/python -m ppg_fast.bench --render

# torch first and pinned: on a machine with CUDA the same pin is the CUDA build. Triton, because the CPU build of torch leaves it out.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel ninja
	$(BIN)/python -m pip install --quiet $(TORCH) numpy
	$(BIN)/python -m pip install --quiet $(TRITON)
	touch $@

$(VENV)/.train: $(VENV)/.torch pyproject.toml $(NATIVE)
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[train]"
	touch $@

$(VENV)/.dev: $(VENV)/.train
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[train,peers,dev]"
	touch $@

clean:
	rm -rf build dist *.egg-info ppg_fast/_C*.so .pytest_cache .ruff_cache .hypothesis
