# make demo: the whole path on the built-in data.   make test: the tests.   Both build their own virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNS := runs/demo

.PHONY: demo test clean

$(VENV)/installed: requirements.txt requirements-test.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-test.txt
	@touch $@

# 1500 labelled rows for SFT and the reward model, the other 18500 are PPO's prompts. The settings were chosen on dev.
demo: $(VENV)/installed
	$(BIN)/python train_sft.py --overwrite --labelled 1500 --epochs 14 --eval_rows 400 --log_every 100 --show 1
	$(BIN)/python train_rm.py --overwrite --pairs_per_row 2 --epochs 7 --patience 5 --checks_per_epoch 1 --dropout 0.1 --log_every 100
	$(BIN)/python train_ppo.py --overwrite --eval_every 30 --eval_rows 500 --learning_rate 3e-4 --value_learning_rate 1e-3 --ppo_epochs 2
	$(BIN)/python -m rllr.evaluate --part test --models $(RUNS)/sft $(RUNS)/ppo-label/last --output_dir $(RUNS)/evaluation --overwrite

test: $(VENV)/installed
	$(BIN)/python -m pytest
	$(BIN)/python tests/mutate.py

clean:
	rm -rf $(VENV) runs build *.egg-info
