# `make demo` runs the main example, `make test` every check, `make quick` the tests of a few seconds, for daily work.
# Each makes its own virtual environment when there is none.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test quick check bench mutation clean

demo: $(VENV)/.demo
	$(BIN)/python examples/harden_digits.py

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope --cov --cov-report=term

quick: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope -m "not slow and not gpu"

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/run_all.py --out out/benchmarks.md

mutation: $(VENV)/.ready
	$(BIN)/python benchmarks/mutation.py --sample 200

# What the demo needs; the development tools come on top.
$(VENV)/.demo: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[examples]"
	touch $@

$(VENV)/.ready: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) out
