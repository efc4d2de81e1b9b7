# `make demo` and `make test` need Python 3.11+, make and a compiler; everything else is set up in .venv.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
export PYTHONDONTWRITEBYTECODE ?= 0

.PHONY: demo test test-long test-gpu check bench proto clean help

help:
	@echo "make demo       from reviews to a streaming endpoint on this machine (a few minutes)"
	@echo "make test       the test suite (CPU, offline)"
	@echo "make test-long  the chaos and scale tests as well"
	@echo "make check      format, lint and types"
	@echo "make bench      the benchmarks"
	@echo "make proto      generated code of the control plane's protocol"
	@echo "make clean      remove .venv, caches and runs"

$(VENV)/.ready: requirements-dev.lock pyproject.toml setup.py data_service/native/rows.c
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Stormjib needs Python 3.11 or newer; set PYTHON=python3.11")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	DS_BUILD_OPS=0 $(PY) -m pip install --quiet --requirement requirements-dev.lock
	$(PY) -m pip install --quiet --no-deps --editable .
	touch $@

$(VENV): $(VENV)/.ready

demo: $(VENV)/.ready
	$(PY) -m examples.demo

# Two processes, a file at a time: half of the tests wait for processes, clusters and deadlines.
test: $(VENV)/.ready
	$(PY) -m pytest -q --numprocesses 2 --dist loadfile

test-long: $(VENV)/.ready
	$(PY) -m pytest -q -m "not gpu" --timeout=3600

test-gpu: $(VENV)/.ready
	$(PY) -m pytest -q -m gpu

check: $(VENV)/.ready
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

bench: $(VENV)/.ready
	for script in benchmarks/[a-z]*.py; do $(PY) -m benchmarks.$$(basename $$script .py) || exit 1; done

# Of the oldest grpcio and protobuf that pyproject.toml allows: newer ones run older code, not the other way round.
proto:
	test -x build/proto/bin/python || $(PYTHON) -m venv build/proto
	build/proto/bin/python -m pip install --quiet "grpcio-tools==1.80.0" "setuptools<81"
	build/proto/bin/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. data_service/control.proto

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info stormjib_rows*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
