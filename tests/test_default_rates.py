"""The three scripts take their default learning rates from `run.rates`: what they say, record, use and resume with."""

import json

import pytest
from toy_runs import ANSWER, read_metrics, run

import rllr.run.rates
import train_rm
import train_sft

LORA = ["--lora_rank", 2]


@pytest.fixture
def large(monkeypatch):
    """Every model counts as one of 400 M weights: a twentieth of the tiny model's rates."""
    monkeypatch.setattr(rllr.run.rates, "decoder_weights", lambda model: 4e8)


def settings(directory):
    return json.loads((directory / "run.json").read_text())["config"]


def sft(toy, out, *flags):
    return run(train_sft.main, *toy.data, *ANSWER, "--epochs", 1, "--show", 0, *flags, "--output_dir", out)


def rm(toy, out, *flags):
    flags = ["--label_pairs", "independent", "--epochs", 1, *ANSWER, *flags]
    return run(train_rm.main, "--policy", toy.sft, *flags, "--output_dir", out)


def test_a_tiny_model_keeps_its_rates(toy, tmp_path):
    output = sft(toy, tmp_path / "sft", "--model", toy.base)
    assert "train_sft: learning_rate=0.001 (full training, 0.05" in output and " M weights)\n" in output
    output = rm(toy, tmp_path / "rm")
    assert "train_rm: learning_rate=0.0005 (full training, 0.05" in output
    output = toy.ppo(tmp_path / "ppo", "--reward", "gold")
    assert "train_ppo: learning_rate=0.0002 (full training, 0.05" in output
    assert "train_ppo: value_learning_rate=0.0005 (full training, 0.05" in output
    assert "extrapolated" not in output


def test_adapters_of_a_tiny_model_take_three_times_its_rates(toy, tmp_path):
    assert "learning_rate=0.0015 (adapters, 0.05" in rm(toy, tmp_path / "rm", *LORA)
    output = toy.ppo(tmp_path / "ppo", "--label_rm", tmp_path / "rm", *LORA)
    assert "train_ppo: learning_rate=0.0006 (adapters, 0.05" in output
    assert "train_ppo: value_learning_rate=0.0015 (adapters, 0.05" in output


def test_a_larger_model_gets_smaller_rates(toy, tmp_path, large):
    doubt = "400 M weights; extrapolated, rates are known up to 106 M)"
    output = sft(toy, tmp_path / "sft", "--model", toy.base)
    assert f"train_sft: learning_rate=5e-05 (full training, {doubt}" in output
    assert settings(tmp_path / "sft")["learning_rate"] == 5e-5
    assert max(line["lr"] for line in read_metrics(tmp_path / "sft", "lr")) == 5e-5
    output = toy.ppo(tmp_path / "ppo", "--reward", "gold", steps=1)
    assert f"train_ppo: learning_rate=1e-05 (full training, {doubt}" in output
    found = settings(tmp_path / "ppo")
    assert (found["learning_rate"], found["value_learning_rate"]) == (1e-5, 2.5e-5)
    lines = read_metrics(tmp_path / "ppo", "judge/score")
    assert lines[0]["improve/lr"] == pytest.approx(1e-5)


def test_a_given_rate_stands(toy, tmp_path, large):
    output = sft(toy, tmp_path / "sft", "--model", toy.base, "--learning_rate", 3e-3)
    assert "learning_rate=0.003" in output and "M weights" not in output
    assert settings(tmp_path / "sft")["learning_rate"] == 3e-3
    output = toy.ppo(tmp_path / "ppo", "--reward", "gold", "--learning_rate", 3e-3, steps=1)
    found = settings(tmp_path / "ppo")
    assert (found["learning_rate"], found["value_learning_rate"]) == (3e-3, 2.5e-5)
    assert "train_ppo: value_learning_rate=2.5e-05 (full training" in output


def test_a_resumed_run_keeps_its_recorded_rate(toy, tmp_path, monkeypatch, large):
    sft(toy, tmp_path / "run", "--model", toy.base, "--save_every", 1, "--schedule", "constant", "--warmup", 0)
    monkeypatch.undo()  # from now on the rule would give 1e-3
    output = run(train_sft.main, "--resume", tmp_path / "run", "--epochs", 2)
    assert "resumed from" in output and "M weights" not in output
    assert settings(tmp_path / "run")["learning_rate"] == 5e-5
    rates = [line["lr"] for line in read_metrics(tmp_path / "run", "lr")]
    assert len(rates) > 2 and set(rates) == {5e-5}
