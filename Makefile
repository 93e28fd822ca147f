# softcache: run the teacher once, train any number of students from its cache.
# Variables: CONFIG (a TOML file), CACHE (a path or URL), STUDENT (a model spec), SET ("a.b=v c.d=w"); of train-student:
# BASELINE (0: no training on hard labels); of sweep: TRIALS, WORKERS, SEEDS (numbers).

PYTHON ?= python3
CONFIG ?= configs/digits.toml
NAME   := $(basename $(notdir $(CONFIG)))
CACHE  ?= runs/$(NAME)/cache
VENV   := .venv
STAMP  := $(VENV)/.installed
VISION := $(VENV)/.vision
# What images need, where nothing else is asked for and not all is there already.
NEEDED := $(if $(wildcard $(STAMP)),$(STAMP),$(if $(filter configs/digits.toml configs/fashion-mnist.toml,$(CONFIG)),$(VISION),$(STAMP)))
VLLM   := .venv-vllm
OLDEST := .venv-oldest
RUN    := $(VENV)/bin/softcache
ARGS   := --config $(CONFIG) $(foreach pair,$(SET),--set '$(pair)')
PICK   := $(if $(STUDENT),--student '$(STUDENT)')
SWEEP  := $(strip $(if $(TRIALS),--trials '$(TRIALS)') $(if $(WORKERS),--workers '$(WORKERS)') $(if $(SEEDS),--seeds '$(SEEDS)'))

.DEFAULT_GOAL := help
.PHONY: help setup teacher-logits train-student train-students sweep distill compare report train-teacher inspect verify fidelity materialize gc test test-fast test-programs test-pages docs package chaos check format test-vllm test-oldest clean bench gpu

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo '  variables: CONFIG=$(CONFIG) CACHE=$(CACHE) STUDENT=$(STUDENT) SET=$(SET)'

setup: $(STAMP)  ## make .venv with everything in it
$(STAMP): pyproject.toml constraints.txt
	$(call install,dev)
	$(VENV)/bin/python -m softcache.runtime.kernels
$(VISION): pyproject.toml constraints.txt
	$(call install,vision)

define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "softcache needs Python 3.11 or later: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[$(1)]'
	@touch $@
endef

teacher-logits: $(NEEDED)  ## run the teacher once over CONFIG's data and fill CACHE
	$(RUN) teacher-logits $(ARGS) --cache '$(CACHE)'

train-student: $(NEEDED)  ## train STUDENT from CACHE, made first if there is none, and on hard labels (BASELINE=0: not)
	$(RUN) teacher-logits $(ARGS) --cache '$(CACHE)' --reuse
	$(RUN) train-student $(ARGS) --cache '$(CACHE)' $(PICK) $(if $(filter 0 no,$(BASELINE)),,--baseline)

train-students: setup  ## train several architectures from CACHE, one table
	$(RUN) teacher-logits $(ARGS) --cache '$(CACHE)' --reuse
	$(RUN) train-students $(ARGS) --cache '$(CACHE)'

sweep: setup  ## search a student's settings from CACHE; TRIALS, WORKERS, SEEDS as the options
	$(RUN) teacher-logits $(ARGS) --cache '$(CACHE)' --reuse
	$(RUN) sweep $(ARGS) --cache '$(CACHE)' $(SWEEP)

distill: setup  ## teacher, cache, STUDENT, export (ONNX, torch.export) and int8, one verified table; SEARCH=1 sweeps first
	$(RUN) distill $(ARGS) --cache '$(CACHE)' $(PICK) $(if $(SEARCH),--sweep)

compare: setup  ## cache, online teacher and hard labels over three seeds
	$(RUN) teacher-logits $(ARGS) --cache '$(CACHE)' --reuse
	$(RUN) compare $(ARGS) --cache '$(CACHE)' $(PICK)

report: setup  ## runs/NAME/report.html about the students of CONFIG; trains them first if need be
	$(RUN) teacher-logits $(ARGS) --cache '$(CACHE)' --reuse
	$(RUN) train-students $(ARGS) --cache '$(CACHE)'
	$(RUN) report 'runs/$(NAME)/students' --cache '$(CACHE)' --out 'runs/$(NAME)/report.html'

train-teacher: setup  ## train CONFIG's teacher on hard labels
	$(RUN) train-teacher $(ARGS)

inspect: setup  ## show what is in CACHE
	$(RUN) inspect '$(CACHE)'

verify: setup  ## check every checksum of CACHE, and the teacher on a sample of rows
	$(RUN) verify '$(CACHE)' $(ARGS)

fidelity: setup  ## measure CACHE against its teacher, and draw bytes against error
	$(RUN) fidelity '$(CACHE)' $(ARGS)

materialize: setup  ## decode CACHE into local memory maps, which all students of this machine share
	$(RUN) materialize '$(CACHE)'

gc: setup  ## list files left by crashed runs in CACHE; DELETE=1 deletes them
	$(RUN) gc '$(CACHE)' $(if $(DELETE),--delete)

bench: setup  ## measure capture, reading, training and opening against named baselines
	$(VENV)/bin/python -m benchmarks

gpu: setup  ## on a machine with a GPU: its tests and measurements, nine minutes, into docs/benchmarks.md
	$(VENV)/bin/python -m benchmarks.gpu --write docs/benchmarks.md

test: setup  ## run the tests, minutes: all but PROGRAMS of tests/conftest.py
	$(VENV)/bin/python -m pytest

test-fast: setup  ## run the tests of the edit loop, a minute: all but SLOW_PATHS of tests/conftest.py
	$(VENV)/bin/python -m pytest --fast

test-programs: setup  ## run the other tests: whole programs, pages of the docs, other frameworks
	$(VENV)/bin/python -m pytest --programs

test-vllm: $(VLLM)/.installed  ## run the tests of teachers in vLLM and of quantized ones, in an environment of its own (3 GB)
	$(VLLM)/bin/python -m pytest -n 2 -m vllm tests/teacher/test_vllm.py tests/teacher/test_quantized.py
$(VLLM)/.installed: constraints-vllm.txt
	rm -rf $(VLLM)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --no-compile --no-deps --requirement constraints-vllm.txt
	$(VLLM)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

test-oldest: $(OLDEST)/.installed  ## run the tests with the oldest versions that pyproject.toml admits, in an environment of its own (9 GB)
	$(OLDEST)/bin/python -m pytest
$(OLDEST)/.installed: pyproject.toml
	rm -rf $(OLDEST)
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet uv
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST)/bin/python --resolution lowest-direct --editable '.[dev]'
	@touch $@

test-pages: setup  ## follow the pages of the docs that take long, half an hour
	$(VENV)/bin/python -m pytest -m pages -o faulthandler_timeout=3600

docs: setup  ## build the documentation's site in site/ (mkdocs serve shows it, with its search)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

package: setup  ## build the wheel, and read a cache with it in an environment without torch
	rm -rf dist build .venv-bare
	$(VENV)/bin/python -m build --wheel --outdir dist . > /dev/null
	$(PYTHON) -m venv .venv-bare
	.venv-bare/bin/python -m pip install --quiet --constraint constraints.txt dist/softcache-*.whl
	cd .venv-bare && bin/python $(CURDIR)/tests/package/bare.py $(CURDIR)/tests/golden

chaos: setup  ## the long versions of what kills, damages and forges caches
	$(VENV)/bin/python -m pytest -m chaos -rP -o faulthandler_timeout=7200
	$(VENV)/bin/python -m pytest -m hypothesis --hypothesis-profile thorough

check: setup  ## lint, format, types and layers
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: setup  ## format the code
	$(VENV)/bin/ruff check --fix-only --quiet .
	$(VENV)/bin/ruff format .

clean:  ## remove what the other targets made: .venv, runs, tool caches
	rm -rf $(VENV) $(VLLM) .venv-bare dist build site runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis softcache.egg-info
	find pipeline stages tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
