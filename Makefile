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

demo: $(VENV)/installed
	$(BIN)/python train_sft.py --overwrite
	$(BIN)/python train_rm.py --overwrite
	$(BIN)/python train_ppo.py --overwrite
	$(BIN)/python -m rllr.evaluate --part test --models $(RUNS)/sft $(RUNS)/ppo-label/last --output_dir $(RUNS)/evaluation

test: $(VENV)/installed
	$(BIN)/python -m pytest
	$(BIN)/python tests/mutate.py

clean:
	rm -rf $(VENV) runs build *.egg-info
