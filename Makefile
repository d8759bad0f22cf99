# `make demo` and `make test` do all their own set-up in .venv; a second run is quick.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
READY := .venv/.ready
DEV := .venv/.ready-dev

.PHONY: demo test lint format lock clean

demo: $(READY)
	@BIN=$(BIN) sh examples/demo.sh

test: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch by its exact version first: an open range would fetch gigabytes of CUDA libraries.
$(READY): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/* csrc/*/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "CoreInfer needs Python 3.10 or newer; name one: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0
	$(PIP) scikit-build-core cmake ninja
	$(PIP) --no-build-isolation --editable .
	@touch $@

$(DEV): $(READY)
	$(PIP) --no-build-isolation --editable '.[semantic,plots,eval,tune,ray]'
	$(PIP) hypothesis mypy pre-commit pytest pytest-xdist ruff
	@touch $@

lock: $(DEV)
	@echo "# Exact versions of everything the tests and the demo run with ('make lock' writes this file)." > constraints.txt
	@$(BIN)/python -m pip freeze --exclude-editable | sed -e 's/+cpu$$//' -e '/^-e /d' >> constraints.txt

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build
