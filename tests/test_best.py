"""Which epoch or step is kept, and what an answer without a label earns."""

import pytest
from toy_runs import ANSWER, read_metrics, run

import train_ppo
import train_rm
import train_sft
from rllr.metrics import rank
from rllr.model.records import read_record
from rllr.tasks import TASKS


def test_rank():
    """The metric first, then fewer parse failures, then the other metrics."""
    base = {"accuracy": 0.5, "macro_f1": 0.4, "parse_failures": 0.1}
    order = [
        base | {"accuracy": 0.4, "parse_failures": 0.0}, base | {"parse_failures": 0.2, "macro_f1": 0.9},
        base | {"macro_f1": 0.3}, base,
        base | {"parse_failures": 0.0, "macro_f1": 0.0}, base | {"accuracy": 0.6, "parse_failures": 1.0},
    ]  # fmt: skip
    ranks = [rank(TASKS["sst2"], scores) for scores in order]
    assert ranks == sorted(ranks) and len(set(ranks)) == len(ranks)


def scripted(monkeypatch, module, results):
    """Evaluations that come out as told: (accuracy, parse failures)."""
    told = iter(results)
    monkeypatch.setattr(
        module,
        "answer_metrics",
        lambda *given: dict(zip(("accuracy", "parse_failures", "macro_f1"), (*next(told), 0.0))),
    )


@pytest.mark.parametrize("results, best", [
    ([(0, 1), (0, 1), (0, 1)], 3), ([(0.5, 0.1), (0.5, 0.0), (0.5, 0.1)], 2), ([(0.6, 0), (0.5, 0), (0.6, 0)], 3),
    ([(0.6, 0), (0.5, 0), (0.5, 0)], 1),
])  # fmt: skip
def test_of_equal_epochs_the_later_one_is_kept(toy, tmp_path, monkeypatch, results, best):
    scripted(monkeypatch, train_sft, results)
    run(train_sft.main, *toy.data, "--model", toy.base, "--epochs", 3, "--output_dir", tmp_path / "sft", *ANSWER)
    assert read_record(tmp_path / "sft")["eval"]["epoch"] == best


@pytest.mark.parametrize("results, best", [
    ([(0.5, 0.0)] * 4, 0), ([(0.5, 0.1), (0.5, 0.0), (0.5, 0.0), (0.4, 0.0)], 2),
    ([(0.5, 0.0), (0.6, 0.0), (0.6, 0.0), (0.6, 0.0)], 3),
])  # fmt: skip
def test_in_ppo_a_tie_with_the_start_keeps_the_start(toy, tmp_path, monkeypatch, results, best):
    scripted(monkeypatch, train_ppo, results)
    toy.ppo(tmp_path / "ppo", "--reward", "gold", "--eval_every", 1, steps=3)
    assert read_record(tmp_path / "ppo" / "best")["step"] == best


@pytest.mark.parametrize("reward", ["label", "rationale", "mixed", "gold"])
def test_an_answer_without_a_label_earns_nothing(toy, tmp_path, monkeypatch, reward):
    """Every label is lost: with a reward model no score is above the SFT mean minus the penalty; gold has its own
    say."""
    monkeypatch.setattr("rllr.answers.parse_answer", lambda task, answer: None)
    models = {"label": ["--label_rm", toy.label_rm], "rationale": ["--rationale_rm", toy.rationale_rm], "gold": []}
    models["mixed"] = models["label"] + models["rationale"]
    output = toy.ppo(
        tmp_path / "ppo", "--reward", reward, *models[reward], "--missing_label_penalty", 1.5, "--log_every", 1, steps=1
    )
    (line,) = read_metrics(tmp_path / "ppo", "judge/score")
    assert line["act/parse_failures"] == 1.0
    assert (line["judge/score"] <= -1.5) == (reward != "gold") and (reward != "gold" or line["judge/score"] >= -1.0)
    assert "warning: 100 % of the sampled answers have no readable label" in output


def test_sft_and_reward_model_warn_when_most_answers_have_no_label(toy, tmp_path):
    output = run(
        train_sft.main,
        *toy.data,
        "--model",
        toy.base,
        "--epochs",
        1,
        "--learning_rate",
        1e-6,
        "--output_dir",
        tmp_path / "sft",
        *ANSWER,
    )
    assert "warning: 100 % of the answers on dev have no readable label" in output
    assert (
        "no readable label" not in toy.outputs["rm-label"]
        and "no readable label" not in toy.outputs["sft"].splitlines()[-1]
    )
    output = run(
        train_rm.main,
        "--policy",
        toy.base,
        *toy.data,
        "--epochs",
        1,
        "--temperature",
        3,
        "--max_new_tokens",
        30,
        "--output_dir",
        tmp_path / "rm",
    )
    assert "of the answers sampled by the policy have no readable label" in output


def test_epochs_between_evaluations(toy, tmp_path):
    """Every second epoch is evaluated, and the last one whatever its number; others are never kept."""
    flags = ["--model", toy.base, "--epochs", 5, "--eval_every", 2, "--output_dir", tmp_path / "sft", *ANSWER]
    run(train_sft.main, *toy.data, *flags)
    assert [line["epoch"] for line in read_metrics(tmp_path / "sft", "eval/accuracy")] == [1, 3, 4]
    assert read_record(tmp_path / "sft")["eval"]["epoch"] in (2, 4, 5)
