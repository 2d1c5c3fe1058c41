# make demo | test | quick | check | coverage | mutants | stress | full | package | audit | docs | docs-serve | slides | bench | gpu | assets | clean.
# Everything is installed into .venv, from the pins in constraints.txt.

PYTHON ?= python3
# Options for installing torch alone, such as the --index-url of a CPU-only build.
TORCH_FLAGS ?=
# Two processes; the tests keep torch to one thread in each.
PYTEST_FLAGS ?= -n 2 --dist worksteal

BIN := .venv/bin
STAMP := .venv/.installed
DEMO_OUT := runs/demo
# A little smaller than `lmgym train Sentiment` alone, so that it takes less than three minutes on two busy cores.
DEMO := $(BIN)/lmgym train Sentiment --preferences.prompts 600 --ppo.updates 20 --out $(DEMO_OUT)

.DEFAULT_GOAL := help

.PHONY: help install demo test quick check coverage mutants stress full package audit docs docs-serve slides lessons bench gpu assets clean

help:
	@sed -n '1,2s/^# //p' Makefile

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "lmgym needs Python 3.11 or newer, and '$(PYTHON)' is not: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(TORCH_FLAGS) "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	rm -rf $(DEMO_OUT)
	$(DEMO)

test: $(STAMP)
	$(BIN)/pytest $(PYTEST_FLAGS)

# The inner loop: the checks, and the tests of what differs from the last commit (or from BASE=main). Under a minute.
quick: check
	$(BIN)/python tests/quick.py $(BASE)

# Lines that the default tests run; shown, not enforced.
coverage: $(STAMP)
	$(BIN)/pytest $(PYTEST_FLAGS) --cov --cov-report=term:skip-covered

# Kills, fuzzing, soaking: minutes.
stress: $(STAMP)
	$(BIN)/pytest -m "stress and not full" $(PYTEST_FLAGS) tests/stress

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/codespell

# Bugs planted in a copy: each must make a test fail. FLAGS=--write puts the table into docs/correctness.md.
mutants: $(STAMP)
	$(BIN)/python tests/mutants.py $(FLAGS)

# All that takes too long for CI: random one-token changes, every planted bug, kills and fuzzing, learning tests, all lessons. An hour or two.
full: $(STAMP)
	$(BIN)/python tests/random_mutants.py --count 300 --jobs 2
	$(BIN)/python tests/mutants.py --jobs 2
	$(BIN)/pytest -m stress $(PYTEST_FLAGS)
	$(BIN)/pytest -m slow $(PYTEST_FLAGS)
	$(MAKE) lessons

# Wheel and sdist into dist/, then the wheel in an environment of its own, used from another folder. The first cell of a
# notebook installs it, as in Colab.
package: $(STAMP)
	rm -rf dist build/clean
	$(BIN)/python -m build
	$(PYTHON) -m venv build/clean
	build/clean/bin/python -m pip install $(TORCH_FLAGS) "$$(grep '^torch==' constraints.txt)"
	build/clean/bin/python -m pip install -c constraints.txt ipykernel nbclient
	cd build/clean && PIP_CONSTRAINT=../../constraints.txt bin/python ../../docs/lessons/make.py --execute lesson_01 --source ../../dist/*.whl
	cd build/clean && bin/lmgym train Sort --sft.examples 64 --ppo.updates 2 --test-prompts 32 --out run && test -s run/report.html

# The pins against the public advisories, from an environment of its own: needs the network.
audit:
	$(PYTHON) -m venv .audit
	.audit/bin/python -m pip install -c constraints.txt pip-audit
	.audit/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt $(FLAGS)

# The site in build/site: lessons, algorithms, how-tos, API. Any broken link fails. `docs-serve` shows it and follows changes.
docs docs-serve: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs $(if $(filter docs,$@),build,serve)

# The slides of the lab and of the sessions (docs/teaching.md) in build/slides: HTML, and PDF where Chromium is installed.
slides: $(STAMP)
	$(BIN)/python docs/lessons/slides.py

# Runs the code of all lessons, which draws their figures anew: five minutes.
lessons: $(STAMP)
	$(BIN)/python docs/lessons/make.py

# Against the peers, which are set up in .bench: half an hour. FLAGS=--quick: two minutes; --device cuda: on a GPU.
bench: $(STAMP)
	$(BIN)/python -m benchmarks.speed $(FLAGS)

# On a machine with a GPU and torch 2.11 or newer: the gpu tests and the CUDA benchmark, within eight minutes.
# Writes benchmarks/gpu.json and lines of benchmarks/results.jsonl. FLAGS=--try-cpu: the same steps, tiny, on a CPU.
gpu: $(STAMP)
	$(BIN)/python -m benchmarks.gpu $(FLAGS)

assets: $(STAMP)
	$(BIN)/python -m agents.tools.make_assets lmgym/assets

# Leaves runs/ alone: results are yours.
clean:
	rm -rf .venv .bench .audit build dist .hypothesis .pytest_cache .ruff_cache .import_linter_cache
	find lmgym agents tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
