# `make demo` runs the main example, `make test` every check, `make quick` the tests of a few seconds, for daily work.
# Each makes its own virtual environment when there is none.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test suite coverage quick check lint types docs lowest release bench mutation clean

demo: $(VENV)/.demo
	$(BIN)/python examples/harden_digits.py

# Bytecode is written, whatever the caller's environment says: many tests start processes that import the package.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder --max-worker-restart 0

# mypy runs beside the tests.
test: lint
	$(MAKE) -j 2 types suite

suite: $(VENV)/.ready
	$(PYTEST) --durations 20

coverage: $(VENV)/.ready
	$(PYTEST) --cov --cov-report=term

quick: $(VENV)/.ready
	$(PYTEST) -m "not slow and not gpu"

check: lint types

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Of scripts, the calls and the names: a change of the package breaks those first, and most scripts have no test.
SCRIPTS := MYPYPATH=benchmarks:examples:examples/paper $(BIN)/mypy --config-file= --check-untyped-defs \
  --ignore-missing-imports --follow-imports=silent $(addprefix --disable-error-code=,arg-type assignment dict-item \
  index list-item misc operator return-value union-attr var-annotated)

types: $(VENV)/.ready
	$(BIN)/mypy
	$(SCRIPTS) benchmarks/*.py
	$(SCRIPTS) examples/*.py examples/paper/*.py

# The site, in out/site; warnings are errors.
docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The quick tests with the lowest versions that pyproject.toml claims.
lowest: $(VENV)/.ready
	mkdir -p out
	$(BIN)/python tools/lowest.py > out/lowest.txt
	$(PYTHON) -m venv --clear out/lowest
	out/lowest/bin/python -m pip install --quiet --constraint out/lowest.txt -e ".[dev]"
	OMP_NUM_THREADS=1 out/lowest/bin/python -m pytest -n 2 --dist loadscope -m "not slow and not gpu"

# The sdist, and the wheel made from it, checked and tried in an environment of its own.
release: $(VENV)/.ready
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv --clear out/release
	out/release/bin/python -m pip install --quiet dist/*.whl
	out/release/bin/python -I tools/smoke.py

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
	rm -rf $(VENV) out dist
