# make demo: the whole path on the built-in data.   make test: the tests.   Both build their own virtual environment, with the very
# versions that were tested (constraints.txt).   make test-all: the slow ones as well.   make lint: style and types.
PYTHON ?= python3
TORCH ?= 2.13.0
VENV := .venv
BIN := $(VENV)/bin
RUNS := runs/demo
PIP := -m pip install --quiet --disable-pip-version-check
REQUIREMENTS := -r requirements.txt -r requirements-test.txt
JOBS ?= 2

.PHONY: demo lint test test-all test-oldest test-newest lock clean

$(VENV)/installed: requirements.txt requirements-test.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) -c constraints.txt $(REQUIREMENTS)
	@touch $@

# 2000 labelled rows, of which 500 have a rationale: SFT learns from these, the reward model from the labels of all. The other 18000 are
# PPO's prompts. The settings were chosen on dev.
demo: $(VENV)/installed
	$(BIN)/python train_sft.py --overwrite --labelled 2000 --rationale_rows 500 --epochs 24 --batch_size 16 --eval_every 8 --eval_rows 400 --log_every 200 --show 1
	$(BIN)/python train_rm.py --overwrite --pairs_per_row 2 --loss span --epochs 3 --patience 5 --batch_size 16 --checks_per_epoch 1 --dropout 0 --log_every 200
	$(BIN)/python train_ppo.py --overwrite --steps 64 --rollout_prompts 128 --minibatches 16 --ppo_epochs 3 --learning_rate 1.5e-4 --value_learning_rate 1e-3 --warmup 0.1 --eval_every 16 --eval_rows 1000 --audit every:32
	$(BIN)/python -m rllr.evaluate --part test --models $(RUNS)/sft $(RUNS)/ppo-label $(RUNS)/ppo-label/last --output_dir $(RUNS)/evaluation --overwrite
	$(BIN)/python -m rllr.report $(RUNS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: $(VENV)/installed
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow"
	$(BIN)/python tests/mutate.py

test-all: test
	$(BIN)/python -m pytest -n $(JOBS) -m slow

# The exact versions that `make demo` and `make test` install: of a fresh environment, as of today.
lock:
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python $(PIP) torch==$(TORCH)
	.venv-lock/bin/python $(PIP) $(REQUIREMENTS)
	echo "# The versions that were tested, direct and transitive. Made by: make lock" > constraints.txt
	.venv-lock/bin/python -m pip list --format=freeze --exclude pip | sed 's/+.*//' >> constraints.txt
	rm -rf .venv-lock

# The suite with the oldest and with the newest versions that requirements*.txt allow (of torch, $(TORCH)), in environments of their own.
test-oldest:
	rm -rf .venv-oldest
	$(PYTHON) -m venv .venv-oldest
	sed -E '/^torch/d; s/>=([0-9.]+).*/==\1/' requirements.txt requirements-test.txt > .venv-oldest/oldest.txt
	.venv-oldest/bin/python $(PIP) torch==$(TORCH) -r .venv-oldest/oldest.txt
	.venv-oldest/bin/python -m pytest -n $(JOBS) --dist loadfile

test-newest:
	rm -rf .venv-newest
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python $(PIP) torch==$(TORCH)
	.venv-newest/bin/python $(PIP) --upgrade --upgrade-strategy eager torch==$(TORCH) $(REQUIREMENTS)
	.venv-newest/bin/python -m pytest -n $(JOBS) --dist loadfile

clean:
	rm -rf $(VENV) .venv-* runs build *.egg-info
