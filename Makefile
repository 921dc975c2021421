# One .venv with everything; every target may be the first that is run after a clone.
#   make quickstart                                fine-tune the starter model and show what it learned
#   make test PYTHON=python3.12 PIP_FLAGS="--index-url https://download.pytorch.org/whl/cu130 --extra-index-url https://pypi.org/simple"

PYTHON ?= python3
PIP_FLAGS ?=
PYTEST_FLAGS ?=
MATRIX_MINUTES ?= 60
ASSETS := smollm2-135m minilm-l6 vader

BIN := .venv/bin
STAMP := .venv/.installed
# Tests run two processes on two cores: a second thread each would slow both down.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help install fetch quickstart test lint format matrix bench gpu clean
.PHONY: reproduce-supervised reproduce-methods reproduce-preferences reproduce-continual reproduce-meta reproduce-distillation
.PHONY: reproduce-multitask reproduce-rl

help:  ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-20s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "lightning_ft needs Python 3.10 or newer and $(PYTHON) is %d.%d: name another one, as in make PYTHON=python3.12 install." % sys.version_info[:2])'
	@# A .venv whose making was interrupted, or whose Python is gone, is made anew.
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install -c constraints.txt $(PIP_FLAGS) -e ".[quant,starter,test]"
	@touch $@

install: $(STAMP)  ## make .venv and install everything into it, pinned by constraints.txt

fetch: install  ## fetch the starter models and data into the cache (nothing is downloaded twice)
	@$(BIN)/python -m lightning_ft.cli.fetch $(ASSETS)

quickstart: install fetch  ## fine-tune the starter model with LoRA and show what it learned
	@$(BIN)/python -m lightning_ft.cli.quickstart

test: install fetch  ## run all tests
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist loadgroup $(PYTEST_FLAGS)

lint: install  ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: install  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

matrix: install  ## every part with every task and placement (cells are begun for an hour; goes on where it stopped)
	MATRIX=all MATRIX_MINUTES=$(MATRIX_MINUTES) $(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist loadgroup tests/matrix $(PYTEST_FLAGS)
	$(ONE_THREAD) $(BIN)/python docs/render_matrix.py

bench: install fetch  ## measure against peers (run nothing else meanwhile)
	$(BIN)/python -m benchmarks.sft

reproduce-meta: install fetch  ## meta-learning of sine waves, its speed; with DATA=FOLDER also of texts, whose label stands elsewhere by META_FLAGS="--label_column category" (goes on where it stopped)
	$(BIN)/python -m benchmarks.meta_sinusoid
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.meta_sinusoid --speed
	$(if $(DATA),$(BIN)/python -m benchmarks.meta_text --data $(DATA) $(META_FLAGS),@echo "Of texts: make reproduce-meta DATA=FOLDER, a folder of CSV files with text and label (of other columns with META_FLAGS='--label_column category').")

reproduce-supervised: install fetch  ## full training against few parameters, on one encoder (an hour; goes on where it stopped)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.supervised

reproduce-methods: install fetch  ## every method on both starter models (hours; goes on where it stopped), then its speed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.methods
	$(BIN)/python -m benchmarks.methods --speed

reproduce-preferences: install fetch  ## a reward model, DPO and KTO on rated sentences (20 minutes; goes on where it stopped)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.preferences

reproduce-rl: install fetch  ## GRPO on sums; PPO, GRPO and DPO on sentiment (two hours; goes on where it stopped); GRPO beside TRL
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.rl_runs --at-once 2
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.sentiment_rl --at-once 2
	$(BIN)/python -m benchmarks.grpo

reproduce-continual: install fetch  ## what continual learning keeps, on digits and both starter models (75 minutes at most; goes on)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.continual --minutes 75

reproduce-distillation: install fetch  ## students with and without a teacher (half a day on one core, minutes on a GPU; goes on), then the cost
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.distillation_runs
	$(BIN)/python -m benchmarks.distillation

reproduce-multitask: install fetch  ## samplers, balancers and surgery against single tasks (60 minutes at most; goes on where it stopped)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.multitask --minutes 60

gpu: install  ## one offline script with random weights for a machine with a GPU
	$(BIN)/python -m benchmarks.gpu

clean:  ## remove caches and .venv (runs/ and the asset cache stay)
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
