"""Which epoch or step is kept, and what an answer without a label earns."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from toy_runs import ANSWER, read_metrics, run, told

import train_rm
import train_sft
from rllr.keeper import Keeper
from rllr.metrics import rank
from rllr.model.records import read_record
from rllr.ppo_models import default_best_by
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


def same_weights(first, second):
    first, second = (load_file(directory / "model.safetensors") for directory in (first, second))
    return all(torch.equal(first[name], second[name]) for name in first)


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


# Of eight rows 2 are right at the start; 4 are 2/8 more, against an error of sqrt(1.5 / 7 / 8) = 0.164; 3 are 1/8 more,
# against 1/8: that is no more than one standard error.
@pytest.mark.parametrize("rights, best", [
    ([2, 2, 2, 2], 0), ([2, 3, 3, 3], 0), ([2, 4, 3, 2], 1), ([2, 4, 4, 3], 2), ([2, 5, 4, 4], 1), ([2, 4, 3, 5], 3),
    ([2, 0, 0, 0], 0),
])  # fmt: skip
def test_ppo_hands_back_what_beats_the_start(toy, tmp_path, monkeypatch, rights, best):
    """By more than one paired standard error; of those the one with the best rank, of equals the later one."""
    told(monkeypatch, {step: (right, 0.0) for step, right in enumerate(rights)})
    output = toy.ppo(tmp_path / "ppo", "--reward", "gold", "--eval_every", 1, steps=3)
    record, sentence = read_record(tmp_path / "ppo" / "best"), output.splitlines()[-1]
    assert record["step"] == best and record["eval"]["accuracy"] == rights[best] / 8
    if best == 0:
        assert "against_start" not in record and same_weights(tmp_path / "ppo" / "best", toy.sft)
        assert sentence == (
            "no step beats the start by more than one standard error: best is the policy that PPO started from"
        )
    else:
        against = record["against_start"]
        assert against["difference"] == (rights[best] - 2) / 8 and against["start"]["accuracy"] == 0.25
        assert 0 < against["standard_error"] < against["difference"] and against["rows"] == 8
        assert sentence.startswith(f"best: step {best}, dev accuracy {100 * rights[best] / 8:.1f} % against 25.0 % at")
        assert f"({100 * against['difference']:+.1f} points, standard error " in sentence


# The score of all rows rises by 0.5, so its paired error is 0; accuracy is told to fall meanwhile.
def test_by_score_what_the_run_pays_chooses(toy, tmp_path, monkeypatch):
    told(monkeypatch, {0: (8, 0.0), 1: (6, 0.5), 2: (5, 0.9), 3: (5, 0.7)})
    flags = ["--label_rm", toy.label_rm, "--eval_every", 1, "--on_hacking", "ignore"]
    output = toy.ppo(tmp_path / "score", *flags, "--best_by", "score", steps=3)
    record, sentence = read_record(tmp_path / "score" / "best"), output.splitlines()[-1]
    assert record["step"] == 2 and record["handed_back"] == sentence
    assert sentence == "best: step 2, dev score 0.9 against 0 at the start (+0.9, standard error 0)"
    output = toy.ppo(tmp_path / "metric", *flags, steps=3)
    assert read_record(tmp_path / "metric" / "best")["step"] == 0 and "best_by=metric" in output


def test_by_score_where_nothing_beats_the_start(toy, tmp_path, monkeypatch):
    told(monkeypatch, {0: (4, 0.5), 1: (8, 0.5)})
    output = toy.ppo(tmp_path / "ppo", "--reward", "gold", "--eval_every", 1, "--best_by", "score", steps=1)
    assert output.splitlines()[-1].startswith("no step's score beats the start by more than one standard error: best")


def test_a_reward_of_ones_own_chooses_by_its_score(toy, tmp_path, monkeypatch):
    """A function, and a reward model that learnt from a file of pairs; what train_rm.py draws itself is of labels."""
    (tmp_path / "my_brevity.py").write_text("def short(samples):\n    return [-len(a) for a in samples.answers]\n")
    monkeypatch.syspath_prepend(tmp_path)
    output = toy.ppo(tmp_path / "ppo", "--reward", "my_brevity:short", steps=1)
    assert "best_by=score" in output and read_record(tmp_path / "ppo" / "best")["config"]["best_by"] == "score"
    for pairs, by in (("label", "metric"), ("rationale", "metric"), ("mine/pairs.jsonl", "score")):
        records = {"rm": {"config": {"pairs": pairs}}, "other": {"config": {"pairs": "label"}}}
        monkeypatch.setattr("rllr.ppo_models.read_record", lambda directory, records=records: records[directory])
        assert default_best_by(SimpleNamespace(reward="label", label_rm="rm", rationale_rm="other")) == by
        assert default_best_by(SimpleNamespace(reward="rationale", label_rm="other", rationale_rm="rm")) == by
    assert default_best_by(SimpleNamespace(reward="gold", label_rm=None)) == "metric"
    assert default_best_by(SimpleNamespace(reward="rationale", label_rm=None, rationale_rm="grounded")) == "metric"


def test_the_sentence_of_a_correlation():
    """Rows have no correlation: what they are compared by is their closeness to the gold label."""
    scores = {"pearson": 0.8123, "accuracy": 0.6}
    best = {"step": 9, "scores": scores, "start": {"pearson": 0.7}, "difference": 0.021, "standard_error": 0.004}
    keeper = SimpleNamespace(
        loop=SimpleNamespace(best=best), run=SimpleNamespace(task=TASKS["stsb"], config=SimpleNamespace(best_by=None)),
        name_of_rows="closeness to the gold label",
    )  # fmt: skip
    assert Keeper.handed_back(keeper) == (
        "best: step 9, dev pearson 0.812 against 0.700 at the start "
        "(closeness to the gold label +2.1 points, standard error 0.4)"
    )


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
