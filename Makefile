# From a fresh checkout: `make demo` trains, joins, generates and judges; `make test` runs the tests. Both set up .venv.
PYTHON ?= python3
RUN ?= runs/shapes
RECIPE ?= training/configs/shapes
# a recipe that has one trains stage 3 on by rewards
REWARD := $(wildcard $(RECIPE)/reward.yaml)
BIN := .venv/bin
READY := .venv/ready
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup demo test test-fast lint clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sd_mini needs Python 3.11 or newer, for example: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(READY)

# what a user runs one by one, in one process, as each start costs several seconds of imports; each goes on where an
# interrupted one stopped, and leaves a finished stage alone
demo: $(READY)
	$(BIN)/python -m training.chain \
	  training.autoencoder --config $(RECIPE)/autoencoder.yaml --run $(RUN) -- \
	  training.text_encoder --config $(RECIPE)/text_encoder.yaml --run $(RUN) -- \
	  training.noise_predictor --config $(RECIPE)/noise_predictor.yaml --run $(RUN) -- \
	  $(if $(REWARD),training.reward --config $(REWARD) --run $(RUN) --) \
	  sd_mini export $(RUN) $(if $(REWARD),--predictor reward) -- \
	  eval $(RUN)/pipeline --data shapes --out $(RUN)/report

# a test file a process, as many as JOBS at once
JOBS ?= 2
# a thread each: of two processes on two cores, four threads would wait for each other
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test: $(READY)
	$(PYTEST) -m "not slow and not gpu"

# what every change touches: the house's rules, golden losses, old folders, the maths, one picture
FAST := tests/test_architecture.py tests/test_before_the_rooms.py tests/test_walks.py tests/test_config.py \
  tests/diffusion tests/shapes tests/training/optim tests/eval/judge

test-fast: $(READY)
	$(PYTEST) -m "not slow and not gpu" $(FAST)

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/ty check sd_mini training eval

clean:
	rm -rf .venv
