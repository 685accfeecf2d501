# Two commands from a bare machine with Python 3.10 or newer: `make demo` and `make test`. Both make .venv first.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# Pip's own record that an extra is installed: made anew when what it was made from changes.
INSTALLED = $(VENV)/.installed-$(1)

# Programs that pin a transformers of their own: each in a folder that only its test puts on the path.
TOOLS := $(patsubst tests/integration/programs/%.txt,$(VENV)/tools/%/.installed,$(wildcard tests/integration/programs/*.txt))

.PHONY: demo test test-all quick quick-tests lint types tests smoke docs bench bench-gpu quality gpu-check clean
ARGS ?=

demo: $(call INSTALLED,demo)
	$(RUN) -m apollo_triton demo $(ARGS)

# Mypy has one core for half a minute: the tests have the other.
test: lint
	$(MAKE) --jobs=2 types tests

lint: $(call INSTALLED,test)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(call INSTALLED,test)
	$(RUN) -m mypy

# A worker that has nothing left takes tests from the other's end, so both end within one test of each other.
PYTEST := $(RUN) -m pytest -n auto --dist worksteal --durations=25

# A case for every bug class. ARGS chooses others: make tests ARGS="tests/core -x"
tests: $(call INSTALLED,test)
	$(PYTEST) --doctest-modules -m "not full" $(ARGS)

# Lint, types, and what takes less than a second a case: for every save.
quick: lint
	$(MAKE) --jobs=2 types quick-tests

quick-tests: $(call INSTALLED,test)
	$(PYTEST) -m "not full and not slow" $(ARGS)

# Every repetition, all codegen targets, the site, foreign programs, two of them with stacks of their own, two Tritons.
test-all: lint types $(call INSTALLED,test-all) $(TOOLS)
	$(PYTEST) --doctest-modules $(ARGS)

# Another Python, and a torch of the registry: make smoke ARGS="--python python3.12 --torch 2.6.0"
smoke: $(call INSTALLED,test)
	$(RUN) tests/smoke.py $(ARGS)

docs: $(call INSTALLED,docs)
	$(RUN) -m mkdocs build --strict

bench: $(call INSTALLED,bench)
	$(RUN) -m bench $(ARGS)

bench-gpu: $(call INSTALLED,bench)
	$(RUN) -m bench --gpu $(ARGS)

# docs/quality.md from nothing: hours. It goes on where it was.
quality: $(call INSTALLED,bench)
	$(RUN) -m bench.quality
	$(RUN) -m bench.quality.fine_tuning
	$(RUN) -m bench.quality.step_time
	$(RUN) -m bench.quality.page

# For a GPU that is lent for a quarter of an hour. Everywhere: make gpu-check ARGS=--rehearse
gpu-check: $(call INSTALLED,bench)
	$(RUN) -m bench.gpu_check $(ARGS)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit("Python 3.10 or newer is needed, this is %d.%d; name another one: make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "python -m venv failed (on Debian: apt install python3-venv)"; exit 1; }

$(VENV)/.installed-%: $(VENV)/bin/python pyproject.toml constraints.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

# One pip at a time in an environment, also under make -j.
$(call INSTALLED,test-all): $(call INSTALLED,test)

$(VENV)/tools/%/.installed: tests/integration/programs/%.txt | $(VENV)/bin/python
	rm -rf $(@D)
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --target $(@D) -r $<
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info
