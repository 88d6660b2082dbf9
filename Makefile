# make demo | make test | make bench | make lint | make env | make clean
# Each makes the environment in .venv if it is missing. PIP_FLAGS is passed to every pip install; WORKERS is how many
# processes share the files of the tests.

PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.complete
PIP := $(RUN) -m pip --disable-pip-version-check install --quiet $(PIP_FLAGS)
PINS := constraints/cpu.txt
WORKERS := 2
DOCS := .venv-docs

.PHONY: demo test test-all bench bench-peers audit lint env clean
.DEFAULT_GOAL := help

.PHONY: help
help:
	@echo "make demo [DATA=events.csv]  train on two processes and show recommendations"
	@echo "make test                    tests that need no GPU"
	@echo "make test-all                the same with the long ones"
	@echo "make bench [PARTS='a b'] [DATA=sequences.txt]  the benchmarks, their rows and pages; alone under 40 minutes"
	@echo "make bench-peers [DATA=sequences.txt] [EPOCHS=e] [SECONDS=s]  beside other libraries, each in its own environment"
	@echo "make lint                    ruff and mypy"
	@echo "make docs                    the site of docs/ in site/, links checked"
	@echo "make env                     the environment in $(VENV), made by the others if it is missing"
	@echo "make clean                   remove caches and build products, keep $(VENV) and outputs"

demo: $(STAMP)
	@$(RUN) -m lightning_gr demo $(if $(DATA),--data "$(DATA)")

test: $(STAMP)
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -q -m "not gpu and not long" -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-all: $(STAMP)
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -q -m "not gpu" -n $(WORKERS) --dist loadfile --no-loadscope-reorder

bench: $(STAMP)
	@$(RUN) benchmarks/run_all.py $(if $(PARTS),--only $(PARTS)) $(if $(DATA),--data "$(DATA)")

bench-peers: $(STAMP)
	@$(RUN) benchmarks/peers/bench_peers.py $(if $(DATA),--data "$(DATA)") $(if $(EPOCHS),--epochs $(EPOCHS)) \
	  $(if $(SECONDS),--seconds $(SECONDS)) $(if $(PIP_FLAGS),--pip-flags="$(PIP_FLAGS)")

# Known vulnerabilities of the pinned set; needs the network.
audit:
	@$(PYTHON) -m venv .venv-audit
	@.venv-audit/bin/pip install -q pip-audit
	@.venv-audit/bin/pip-audit --strict --no-deps --disable-pip -r constraints/cpu.txt

lint: $(STAMP)
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

# The source is read and not imported, so the site needs neither torch nor $(VENV).
.PHONY: docs
docs: $(DOCS)/.complete
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs --quiet build --strict
	@echo "make docs: site/index.html"

$(DOCS)/.complete: constraints/docs.txt
	@$(PYTHON) -m venv --clear $(DOCS)
	@$(DOCS)/bin/python -m pip --disable-pip-version-check install --quiet $(PIP_FLAGS) -r constraints/docs.txt
	@touch $@

env: $(STAMP)

# The stamp is written last, so that an interrupted run is taken up again; a sound environment is brought up to date.
$(STAMP): pyproject.toml $(PINS)
	@rm -f $@
	@$(RUN) -m pip --version >/dev/null 2>&1 || { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	    echo "make env: error: PYTHON=$(PYTHON) is $$($(PYTHON) --version 2>&1 || true); Python 3.10 or later is needed: make env PYTHON=python3.11" >&2; exit 1; }; \
	  echo "make env: a virtual environment in $(VENV) ($$($(PYTHON) --version 2>&1))"; \
	  $(PYTHON) -m venv --clear $(VENV) || { \
	    echo "make env: error: $(PYTHON) -m venv failed; install its venv module (Debian: apt install python3-venv)" >&2; exit 1; }; }
	@echo "make env: 1/3 torch (the largest download)"
	@$(PIP) --upgrade pip
	@$(PIP) -c $(PINS) torch
	@echo "make env: 2/3 lightning-gr, its dependencies and the tools of its tests"
	@PYTHONWARNINGS=ignore $(PIP) -c $(PINS) -e ".[dev]"
	@echo "make env: 3/3 torchrec and fbgemm-gpu-cpu"
	@$(PIP) --no-deps -c $(PINS) torchrec fbgemm-gpu-cpu
	@touch $@
	@echo "make env: done"

clean:
	@rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	@find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
