"""The three scripts from end to end, in process, on tiny models: what they write, learn and promise."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, tiny_model, toy_tokenizer
from safetensors.torch import load_file
from toy_runs import ANSWER, DEV_ROWS, OTHER, TRAIN_ROWS, read_lines, read_metrics, run, write_rows
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import train_ppo
import train_rm
import train_sft
from rllr import evaluate, predict, rm_pairs, tasks, update
from rllr.common.errors import RunError
from rllr.data import met_rows, splits
from rllr.data.encoding import Encoder
from rllr.layout import pack
from rllr.model.heads import RewardModel
from rllr.model.loading import load_policy, load_tokenizer
from rllr.model.records import read_record
from rllr.rationales import factory as rationales
from rllr.report import __main__ as report
from rllr.report.ppo_step import first_look_at_full_rate, idle_clip_sentence
from rllr.rewards import pairwise_accuracy
from rllr.run.optimizer import Optimizer

ROOT = Path(__file__).parent.parent

STEP_METRICS = {
    "step", "episodes", "seconds",
    "act/tokens_per_second", "act/response_len", "act/truncated", "act/parse_failures", "act/grounded",
    "analyse/kl_sequence", "analyse/kl_token", "analyse/entropy", "analyse/logprob_gap",
    "judge/label_score", "judge/score",
    "shape/kl_coef", "shape/reward",
    "credit/advantage_std", "credit/explained_variance",
    "improve/policy_loss", "improve/value_loss", "improve/clipfrac", "improve/value_clipfrac", "improve/approx_kl",
    "improve/first_ratio_error", "improve/ratio_max", "improve/grad_norm_policy", "improve/grad_norm_value",
    "improve/lr", "time/rollout", "time/score", "time/update",
}  # fmt: skip


@pytest.fixture(scope="session")
def gold_run(toy, tmp_path_factory):
    """A longer run against the gold label: 45 steps. So warm that sampled answers are often wrong at the start, however
    good an SFT policy this machine's rounding has made."""
    directory = tmp_path_factory.mktemp("gold") / "ppo"
    output = toy.ppo(
        directory, "--reward", "gold", "--rollout_prompts", 24, "--eval_rows", 0, "--kl_coef", 0.02,
        "--temperature", 2, "--learning_rate", 2e-3, "--value_learning_rate", 2e-3, "--no-freeze_embeddings", steps=45,
    )  # fmt: skip
    return directory, output


def comparable(lines):
    """Metrics without what depends on the clock."""
    clock = ("time/", "seconds", "act/tokens_per_second")
    return [{name: value for name, value in line.items() if not name.startswith(clock)} for line in lines]


def differing(first, second, tolerance):
    """Names (with both values) of metrics that differ by more than the tolerance."""
    assert len(first) == len(second)
    found = {}
    for a, b in zip(comparable(first), comparable(second), strict=True):
        assert a.keys() == b.keys()
        close = {name for name in a if math.isclose(a[name], b[name], rel_tol=tolerance / 10, abs_tol=tolerance)}
        found |= {name: (a[name], b[name]) for name in a.keys() - close}
    return found


def weights(directory):
    return load_file(Path(directory) / "model.safetensors")


def same_weights(first, second):
    first, second = weights(first), weights(second)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def generates(directory):
    """A saved policy works with plain transformers: load model and tokenizer, generate."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    prompt = tokenizer("the soup was tasty\n", return_tensors="pt").input_ids
    mask = torch.ones_like(prompt)
    ids = model.generate(prompt, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    return ids.shape[1] > prompt.shape[1]


# ---- supervised fine-tuning ------------------------------------------------------------------------------------------


def test_sft_overfits_eight_examples(toy, tmp_path):
    data = write_rows(tmp_path / "ten.jsonl", TRAIN_ROWS[:5] + TRAIN_ROWS[-5:])
    run(train_sft.main, "--task", toy.task, "--train_file", data, "--eval_file", data, "--held_out", 0.2,
        "--model", toy.base, "--epochs", 160, "--batch_size", 8, "--learning_rate", 5e-3, "--schedule", "constant",
        "--dropout", 0, "--show", 0, *ANSWER, "--output_dir", tmp_path / "sft")  # fmt: skip
    losses = read_metrics(tmp_path / "sft", "loss")
    assert len(losses) == 160 and losses[0]["loss"] > 3 and losses[-1]["loss"] < 0.05

    record = read_record(tmp_path / "sft")
    config = splits.DataConfig(**record["data"])
    trained_on = splits.load_splits(config, tasks.load_task(str(toy.task)), lambda line: None).labelled
    assert len(trained_on) == 8
    rows = write_rows(tmp_path / "eight.jsonl", [{"text": example.text} for example in trained_on])
    run(predict.main, "--model", tmp_path / "sft", "--input", rows, "--output", tmp_path / "answers.jsonl")
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [answer["label"] for answer in answers] == [example.label for example in trained_on]
    assert [answer["rationale"] for answer in answers] == [example.rationale for example in trained_on]


def test_sft_writes_a_plain_model_and_its_record(toy):
    assert generates(toy.sft)
    record = read_record(toy.sft)
    assert record["stage"] == "sft" and record["tiny"] and record["task"]["name"] == "toy"
    assert record["config"]["rationales"] == "given" and record["data"]["labelled"] == 40
    evaluated = read_metrics(toy.sft, "eval/accuracy")
    assert [line["epoch"] for line in evaluated] == list(range(30))
    assert record["eval"]["accuracy"] == max(line["eval/accuracy"] for line in evaluated) > 0.6
    assert len(read_metrics(toy.sft, "loss", "grad_norm", "lr")) == 30 * 5


@pytest.mark.parametrize("name, arguments", [("train_sft", []), ("train_rm", ["--dropout", 0])])
def test_micro_batches_do_not_change_training(toy, tmp_path, name, arguments):
    main, source = (train_sft.main, "--model") if name == "train_sft" else (train_rm.main, "--policy")
    start = [*(toy.data if name == "train_sft" else []), source, toy.base if name == "train_sft" else toy.sft]
    lines = []
    for split in (["--micro_batch_size", 0], ["--micro_batch_size", 2], ["--tokens_per_batch", 80]):
        run(main, *start, *arguments, "--epochs", 1, "--batch_size", 8, *split, "--dropout", 0,
            "--learning_rate", 1e-3, "--max_new_tokens", 12, "--output_dir", tmp_path / str(split[1]))  # fmt: skip
        lines.append(read_metrics(tmp_path / str(split[1])))
    assert not differing(*lines[:2], tolerance=1e-4) and not differing(*lines[::2], tolerance=1e-4)


def test_label_format_trains_without_rationales(toy, tmp_path):
    flags = ["--model", toy.base, "--answer_format", "label", "--epochs", 1, "--output_dir", tmp_path / "sft"]
    run(train_sft.main, *toy.data, *flags)
    assert read_record(tmp_path / "sft")["task"]["answer_format"] == "label"


# ---- reward models ---------------------------------------------------------------------------------------------------


def training_pairs(toy, directory):
    """A reward model's own training pairs as it drew them, and its scores of both sides."""
    record = read_record(directory)
    config = train_rm.Config(**record["config"])
    task = tasks.load_task(str(toy.task))
    encoder = Encoder(load_tokenizer(toy.sft), load_policy(toy.sft))
    labelled = splits.load_splits(config, task, lambda line: None).labelled
    writer = rationales.make_writer(config.rationales, labelled, task)
    rows, pairs = rm_pairs.encode_pairs(rm_pairs.draw_pairs(config, labelled, task, writer, config.seed), encoder, 48)
    model = RewardModel.from_pretrained(directory)
    return pairs, rows, encoder, train_rm.score_pairs(model, rows, encoder, config)


@pytest.mark.parametrize("loss", ["eos", "span"])
def test_reward_model_ranks_its_training_pairs(toy, tmp_path, loss):
    directory = toy.label_rm
    if loss == "span":
        directory = tmp_path / "rm"
        run(train_rm.main, "--policy", toy.sft, *toy.rm_flags, "--loss", "span", "--output_dir", directory)
    assert read_record(directory)["config"]["loss"] == loss
    pairs, _, _, (chosen, rejected) = training_pairs(toy, directory)
    assert len(pairs) >= 36 and pairwise_accuracy(chosen, rejected) > 0.9


def test_reward_model_reports_and_stores_its_scores(toy):
    report, metrics = read_record(toy.label_rm)["report"], read_metrics(toy.label_rm, "eval/accuracy")
    assert report["pairs"]["all"]["accuracy"] > 0.7 and report["classifier"]["eval"]["rows"] == len(DEV_ROWS)
    assert {"label/paper", "label/flipped"} <= report[
        "pairs"
    ].keys()  # written pairs, and pairs of the policy's samples
    assert report["classifier"]["eval"]["reward_model"] >= report["classifier"]["eval"]["policy"]
    assert metrics[-1]["eval/loss"] < metrics[0]["eval/loss"]
    for directory in (toy.label_rm, toy.rationale_rm):
        statistics = json.loads((directory / "score_statistics.json").read_text())
        assert statistics["std"] > 0 and statistics["count"] >= 2 and len(statistics["quantiles"]) == 101
        assert statistics["quantiles"] == sorted(statistics["quantiles"])
        assert statistics["policy_fingerprint"] == read_record(toy.sft)["fingerprint"]
    assert "classifier" not in read_record(toy.rationale_rm)["report"]
    assert "fewer than 512" in toy.outputs["rm-label"]


def test_reward_model_loads_as_a_sequence_classifier(toy):
    _, rows, encoder, (chosen, _) = training_pairs(toy, toy.label_rm)
    classifier = AutoModelForSequenceClassification.from_pretrained(toy.label_rm).eval()
    sequences, prompt_lens, mask = pack([(prompt, answer) for prompt, answer, *_ in rows], encoder.pad_id, "cpu")
    attention = torch.arange(sequences.shape[1]) < (prompt_lens + mask.sum(1)).unsqueeze(1)
    with torch.no_grad():
        scores = classifier(input_ids=sequences, attention_mask=attention.long()).logits.squeeze(1)
    torch.testing.assert_close(scores, chosen, rtol=1e-4, atol=1e-4)


def test_reward_model_from_a_file_of_pairs(toy, tmp_path):
    pairs = [
        {"prompt": row["text"], "kind": "mine",
         "chosen": f"so\nLabel: {row['label']}", "rejected": f"so\nLabel: {OTHER[row['label']]}"}
        for row in TRAIN_ROWS
    ]  # fmt: skip
    pairs[7]["rejected"] = pairs[7]["chosen"]
    file = write_rows(tmp_path / "pairs.jsonl", pairs)
    output = run(train_rm.main, "--policy", toy.sft, *toy.rm_flags, "--pairs", file, "--output_dir", tmp_path / "rm")
    assert "1 dropped (chosen equals rejected): line 8" in output and "mine" in output
    record = read_record(tmp_path / "rm")
    assert record["stage"] == "rm-file" and record["report"]["pairs"]["all"]["pairs"] == 5
    assert "label_pairs" not in output and "prompts are not of" not in output  # the file has all pairs that there are
    output = toy.ppo(tmp_path / "ppo", "--label_rm", tmp_path / "rm", steps=1)
    assert "best_by=score" in output


def test_prompts_of_a_file_that_are_not_the_tasks_are_told_of(tmp_path):
    pairs = [SimpleNamespace(prompt=prompt) for prompt in ("Sentence: it\nNegative or positive?", "it", "Sentence: so")]
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rm_pairs, "say", told.append)
        rm_pairs.tell_other_prompts(pairs, tasks.TASKS["sst2"], "mine.jsonl")
        pairs = [SimpleNamespace(prompt=tasks.TASKS["sst2"].render_prompt("it"))]
        rm_pairs.tell_other_prompts(pairs, tasks.TASKS["sst2"], "mine.jsonl")
    (line,) = told
    assert line.startswith("warning: mine.jsonl: 3 of 3 prompts are not of the task's form 'Sentence: {text}")


def test_fewer_prompts_than_a_rollout_are_told_of(toy, tmp_path):
    """Forty rows are one step of a hundred prompts, which is soon over."""
    flags = ["--policy", toy.sft, "--reward", "gold", *ANSWER, "--eval_rows", 8, "--prompts", "labelled"]
    output = run(train_ppo.main, *flags, "--rollout_prompts", 30, "--output_dir", tmp_path / "one")
    assert "prompts make one step of --rollout_prompts 30; give --steps" in output and "steps=1" in output


# ---- PPO: rewards, metrics, what is written --------------------------------------------------------------------------


def test_ppo_raises_the_gold_reward(gold_run):
    directory, output = gold_run
    scores = [line["judge/score"] for line in read_metrics(directory, "judge/score")]
    third = len(scores) // 3
    first, last = sum(scores[:third]) / third, sum(scores[-third:]) / third
    assert len(scores) == 45 and last > first + 0.1
    evaluated = read_metrics(directory, "eval/accuracy")
    assert [line["step"] for line in evaluated] == [0, 20, 40, 45]
    best = read_record(directory / "best")
    against = best.get("against_start", {"difference": 1, "standard_error": 0})
    assert against["difference"] > against["standard_error"] and (best["step"] == 0) == ("against_start" not in best)
    assert "before  dev accuracy" in output and "after   dev accuracy" in output


def test_ppo_ratio_is_one_on_every_first_minibatch(gold_run):
    errors = [line["improve/first_ratio_error"] for line in read_metrics(gold_run[0], "judge/score")]
    assert max(errors) < 1e-5
    gaps = [line["analyse/logprob_gap"] for line in read_metrics(gold_run[0], "judge/score")]
    assert max(gaps) < 1e-4


def test_ppo_steps_are_tied_together_by_the_metrics(gold_run):
    lines = read_metrics(gold_run[0], "judge/score")
    assert [line["step"] for line in lines] == list(range(1, 46)) and lines[-1]["episodes"] == 45 * 24
    assert lines[0]["analyse/kl_sequence"] == pytest.approx(0, abs=1e-5) and lines[-1]["analyse/kl_sequence"] > 0.01
    rates = [line["improve/lr"] for line in lines]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(rates[0] / 45)  # that of a step's first update
    for line in lines:  # reward = score - beta * KL, summed over the answer
        expected = line["judge/score"] - line["shape/kl_coef"] * line["analyse/kl_sequence"]
        assert line["shape/reward"] == pytest.approx(expected, abs=1e-4)
        assert line["judge/label_score"] == pytest.approx(line["judge/accuracy"])


@pytest.mark.parametrize(
    "clipfrac, moved, updates, told",
    [
        (0.0, 4e-5, 2, True),
        (9e-4, 2.9e-4, 2, True),
        (1e-3, 4e-5, 2, False),  # the clip acted
        (0.0, 3e-4, 2, False),  # the policy moved
        (0.0, 0.0, 1, False),  # the ratio of a rollout's only update is 1
    ],
)
def test_a_rollout_whose_updates_are_small_is_told_of(clipfrac, moved, updates, told):
    line = {"improve/clipfrac": torch.tensor(clipfrac), "improve/approx_kl": torch.tensor(moved)}
    config = SimpleNamespace(ppo_epochs=1, minibatches=updates)
    assert bool(idle_clip_sentence(line, config)) == told
    assert idle_clip_sentence({"act/truncated": 0.0}, config) is None  # --on_ref_kl skip: there was no update


def test_small_updates_are_told_of_at_the_first_look_after_the_warm_up(toy, tmp_path):
    small = toy.ppo(tmp_path / "small", "--reward", "gold", "--learning_rate", 1e-7, "--eval_every", 2, steps=4)
    assert small.count("hint: this rollout moved the policy by") == 1 and "the clip met 0 of 1,000 tokens" in small
    look = SimpleNamespace(eval_every=20, steps=250, warmup=0.1)
    assert first_look_at_full_rate(look) == 40  # of 250 rollouts 25 warm up
    far = toy.ppo(tmp_path / "far", "--reward", "gold", "--learning_rate", 1e-2, "--eval_every", 2, steps=4)
    assert "hint: this rollout" not in far


@pytest.mark.parametrize(
    ("accuracies", "told"),
    [
        # 24 dev rows: at 0.8 one standard error is sqrt(0.8 * 0.2 / 24) = 0.082
        ((0.5, 0.8), "from 50.0 % after epoch 1 to 80.0 %"),
        ((0.5, 0.71, 0.6, 0.8), "from 71.0 % after epoch 2 to 80.0 %"),  # the best before, not the look before
        ((0.5, 0.73, 0.6, 0.8), None),
        ((0.5, 0.8, 0.8), None),  # a tie keeps the later one, which has not risen
        ((0.5, 0.9, 0.6), None),
        ((0.8,), None),
    ],
)
def test_sft_that_stops_on_its_way_up_is_told_of(toy, tmp_path, monkeypatch, accuracies, told):
    """As a tiny model's SFT on real data did, and nothing said so."""
    looks = iter(accuracies)
    monkeypatch.setattr(train_sft, "evaluate_epoch", lambda *_: {
        "accuracy": next(looks), "macro_f1": 0.5, "parse_failures": 0.0
    })  # fmt: skip
    output = run(train_sft.main, *toy.data, "--model", toy.base, "--epochs", len(accuracies), "--output_dir",
                 tmp_path / "sft", *ANSWER)  # fmt: skip
    assert ("hint: dev accuracy was still rising, " + told in output) if told else "hint" not in output


def test_sft_that_is_judged_by_pearson_alone_has_no_hint():
    assert train_sft.rising_sentence({"pearson": 0.9, "epoch": 2}, {"pearson": 0.1, "epoch": 1}, 2, 100) is None


REWARDS = {
    "label": (set(), {"judge/label_clipped"}),
    "rationale": ({"judge/rationale_score"}, {"judge/rationale_clipped"}),
    "mixed": ({"judge/rationale_score", "judge/at_threshold"}, {"judge/label_clipped", "judge/rationale_clipped"}),
    "gold": ({"judge/accuracy"}, {"act/grounded_right", "act/grounded_wrong"}),
    "toy_rewards:shortness": (set(), set()),
}


@pytest.mark.parametrize("reward", REWARDS)
def test_ppo_with_each_reward(toy, tmp_path, monkeypatch, reward):
    function = "def shortness(samples):\n    return [-len(answer) / 10 for answer in samples.answers]\n"
    (tmp_path / "toy_rewards.py").write_text(function)
    monkeypatch.syspath_prepend(tmp_path)
    flags = ["--reward", reward]
    flags += ["--label_rm", toy.label_rm] if reward in ("label", "mixed") else []
    flags += ["--rationale_rm", toy.rationale_rm] if reward in ("rationale", "mixed") else []
    flags += ["--threshold", -0.5] if reward == "mixed" else []
    toy.ppo(tmp_path / "ppo", *flags, steps=3)
    lines = read_metrics(tmp_path / "ppo", "judge/score")
    more, ours = REWARDS[reward]
    wanted = STEP_METRICS | more
    wanted -= {"judge/label_score"} if reward == "rationale" else set()
    for line in lines:
        assert wanted <= line.keys()
        extra = {"improve/ratio_mean", "judge/score_parse_failures", "judge/score_parsed"} | ours
        assert not {name for name in line.keys() - wanted - extra if not name.startswith("eval/")}
        assert line["improve/first_ratio_error"] < 1e-5
        assert all(isinstance(value, (int, float)) for value in line.values()), line
    assert [line["step"] for line in read_metrics(tmp_path / "ppo", "eval/accuracy", "eval/macro_f1")] == [0, 3]
    for name in ("last", "best"):
        assert generates(tmp_path / "ppo" / name)
        assert read_record(tmp_path / "ppo" / name)["config"]["reward"] == reward
    assert not same_weights(tmp_path / "ppo" / "last", toy.sft)
    if reward == "mixed":
        assert max(line["judge/at_threshold"] for line in lines) > 0
        assert all(line["judge/score"] <= line["judge/rationale_score"] - 0.5 + 1e-5 for line in lines)


@pytest.mark.parametrize("reward", ["mixed", "rationale"])
def test_ppo_with_the_rule_in_place_of_a_rationale_reward_model(toy, tmp_path, reward, capsys):
    flags = ["--reward", reward, "--rationale_rm", "grounded"]
    flags += ["--label_rm", toy.label_rm, "--threshold", 0.25] if reward == "mixed" else []
    printed = toy.ppo(tmp_path / "ppo", *flags)
    for line in read_metrics(tmp_path / "ppo", "judge/score"):
        assert 0 < line["judge/rationale_score"] <= line["act/grounded"] + 1e-6  # which leaves out what names nothing
        assert "judge/rationale_clipped" not in line
    began = f"from {toy.label_rm}" if reward == "mixed" else "SFT backbone with a zero head"
    assert f"value model: {began}" in printed
    assert read_record(tmp_path / "ppo" / "last")["config"]["rationale_rm"] == "grounded"  # a word, no path
    toy.ppo(tmp_path / "ppo", *flags, "--resume")  # it is the same run
    with pytest.raises(SystemExit):
        toy.ppo(tmp_path / "ppo", *flags, "--rationale_rm", toy.rationale_rm, "--resume")
    assert "this would be another run: --rationale_rm" in capsys.readouterr().err


def test_the_rule_judges_rationales_alone(toy, tmp_path, capsys):
    with pytest.raises(SystemExit):
        toy.ppo(tmp_path / "ppo", "--label_rm", "grounded")
    assert "--label_rm grounded: no such directory" in capsys.readouterr().err


def test_ppo_with_several_answers_to_a_prompt(toy, tmp_path, monkeypatch):
    """Each answer stands beside its own prompt's row, all count, and a score counts relative to its prompt's others."""
    read, asked = train_ppo.read_samples, []

    def checked(rollout, examples, task, encoder, gold):
        for row, example in enumerate(examples):
            prompt = rollout.sequences[row, : rollout.prompt_lens[row]].tolist()
            assert prompt == encoder.prompts(task, [example])[0]
        asked.append([example.id for example in examples])
        return read(rollout, examples, task, encoder, gold)

    monkeypatch.setattr(train_ppo, "read_samples", checked)
    toy.ppo(tmp_path / "ppo", "--label_rm", toy.label_rm, "--rollout_prompts", 6, "--answers_per_prompt", 4, steps=2)
    for ids in asked:
        assert len(ids) == 24 and [ids[i] for i in range(0, 24, 4) for _ in range(4)] == ids and len(set(ids)) == 6
    lines = read_metrics(tmp_path / "ppo", "judge/score")
    assert [line["episodes"] for line in lines] == [24, 48]
    for line in lines:  # relative scores add up to 0: the KL alone is left of the mean
        assert abs(line["judge/score"]) > 1e-3
        assert line["shape/reward"] == pytest.approx(-line["shape/kl_coef"] * line["analyse/kl_sequence"], abs=1e-5)
    assert not same_weights(tmp_path / "ppo" / "last", toy.sft)


def test_ppo_knows_no_gold_labels_of_unlabelled_prompts(toy, tmp_path):
    output = toy.ppo(tmp_path / "ppo", "--label_rm", toy.label_rm, steps=1)
    assert "prompts: 12 unlabelled rows" in output
    assert not read_metrics(tmp_path / "ppo", "judge/accuracy")


def test_ppo_answers_the_labelled_rows_where_it_is_told_to(toy, tmp_path, monkeypatch):
    answered = set()
    read = train_ppo.read_samples

    def spy(rollout, examples, *rest):
        answered.update(example.text for example in examples)
        return read(rollout, examples, *rest)

    monkeypatch.setattr(train_ppo, "read_samples", spy)
    config, task = splits.DataConfig(**read_record(toy.sft)["data"]), tasks.load_task(str(toy.task))
    found = splits.load_splits(config, task, lambda line: None)
    for kind, rows in (("labelled", found.labelled), ("auto", found.unlabelled)):
        answered.clear()
        output = toy.ppo(tmp_path / kind, "--reward", "gold", "--prompts", kind, steps=6)  # 48 answers: all of the rows
        assert answered == {row.text for row in rows}
        assert f"prompts: {len(rows)} {'un' * (kind == 'auto')}labelled rows" in output
        last = tmp_path / kind / "last"
        assert read_record(last)["config"]["prompts"] == kind
        assert met_rows.recorded_hashes(last)["prompts"] == met_rows.hashes_of(rows)
    assert not {row.text for row in found.labelled} & {row.text for row in found.unlabelled}


def test_same_seed_same_run(toy, tmp_path):
    models = ["--label_rm", toy.label_rm, "--rationale_rm", toy.rationale_rm]
    flags = ["--reward", "mixed", *models, "--micro_batch_size", 2]
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        toy.ppo(tmp_path / name, *flags, "--seed", seed, steps=3)
    lines = [comparable(read_metrics(tmp_path / name)) for name in "abc"]
    assert lines[0] == lines[1] and same_weights(tmp_path / "a" / "last", tmp_path / "b" / "last")
    assert lines[0] != lines[2]


def test_sft_and_rm_same_seed_same_run(toy, tmp_path):
    for name in "ab":
        flags = ["--epochs", 1, "--dropout", 0.1, *ANSWER]
        run(train_sft.main, *toy.data, "--model", toy.base, *flags, "--output_dir", tmp_path / f"sft-{name}")
        run(train_rm.main, "--policy", toy.sft, *flags, "--output_dir", tmp_path / f"rm-{name}")
    for stage in ("sft", "rm"):
        first, second = tmp_path / f"{stage}-a", tmp_path / f"{stage}-b"
        assert comparable(read_metrics(first)) == comparable(read_metrics(second)) and same_weights(first, second)


# ---- PPO: settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [1, 2])
def test_ppo_micro_batches_do_not_change_the_run(toy, tmp_path, epochs):
    for name, split in (("0", []), ("1", ["--micro_batch_size", 1]), ("2", ["--tokens_per_batch", 60])):
        toy.ppo(tmp_path / name, "--label_rm", toy.label_rm, "--ppo_epochs", epochs, *split, steps=3)
    for name in ("1", "2"):
        assert not differing(read_metrics(tmp_path / "0"), read_metrics(tmp_path / name), tolerance=1e-4)


def test_max_update_kl_skips_the_rest_of_a_rollout(toy, tmp_path):
    flags = ["--reward", "gold", "--ppo_epochs", 2, "--learning_rate", 1e-3]
    toy.ppo(tmp_path / "all", *flags)
    toy.ppo(tmp_path / "skip", *flags, "--max_update_kl", 1e-12)
    everything, skipping = (read_metrics(tmp_path / name, "judge/score") for name in ("all", "skip"))
    # 2 steps of 2 epochs of 2 minibatches: 8 updates are planned; with the skip only the first of each step is made
    assert [line["improve/lr"] for line in everything] == pytest.approx([1e-3, 1e-3 * 4 / 8])
    assert [line["improve/lr"] for line in skipping] == pytest.approx([1e-3, 1e-3 * 7 / 8])
    assert all(line["improve/approx_kl"] > 1e-9 for line in everything + skipping)  # the one that was too far shows


@pytest.mark.parametrize("adapters", [[], ["--lora_rank", 2]])
def test_gradient_checkpointing_changes_nothing(toy, tmp_path, adapters):
    """All three stages, dropout on in the first two: the same losses and weights as without."""
    for name, flag in (("without", []), ("with", ["--gradient_checkpointing"])):
        flags = [*adapters, *flag, "--learning_rate", 1e-3]
        short = [*flags, "--epochs", 1, "--dropout", 0.1, "--max_new_tokens", 12]
        run(train_sft.main, *toy.data, "--model", toy.base, *short, "--output_dir", tmp_path / name / "sft")
        run(train_rm.main, "--policy", toy.sft, *short, "--output_dir", tmp_path / name / "rm")
        toy.ppo(tmp_path / name / "ppo", "--reward", "gold", *flags, steps=2)
    for stage in ("sft", "rm", "ppo"):
        lines = [read_metrics(tmp_path / name / stage) for name in ("without", "with")]
        assert not differing(*lines, tolerance=1e-5)


@pytest.mark.parametrize("warmup, expected", [(0, [1e-3, 5e-4]), (0.5, [5e-4, 1e-3])])
def test_warmup_of_the_policy(toy, tmp_path, warmup, expected):
    """Four updates in two steps: the rate of the first and of the third; with a warm-up of two the peak comes later."""
    toy.ppo(tmp_path / "ppo", "--reward", "gold", "--learning_rate", 1e-3, "--warmup", warmup, steps=2)
    lines = read_metrics(tmp_path / "ppo", "judge/score")
    assert [line["improve/lr"] for line in lines] == pytest.approx(expected)


def test_score_norm(toy, tmp_path):
    flags = ["--label_rm", toy.label_rm, "--missing_eos_penalty", 0, "--max_new_tokens", 20]
    statistics = json.loads((toy.label_rm / "score_statistics.json").read_text())
    first = {}
    for norm in ("stored", "running", "none"):
        toy.ppo(tmp_path / norm, *flags, "--score_norm", norm)
        first[norm] = read_metrics(tmp_path / norm, "judge/score")[0]
    assert first["stored"]["judge/label_clipped"] == first["none"]["judge/label_clipped"] == 0
    standardised = (first["none"]["judge/label_score"] - statistics["mean"]) / statistics["std"]
    assert first["stored"]["judge/label_score"] == pytest.approx(standardised, abs=1e-4)
    assert 0.01 < abs(first["running"]["judge/label_score"] - standardised) < 1


def test_value_model_starts_where_it_is_told(toy, tmp_path):
    zero = toy.ppo(tmp_path / "zero", "--reward", "gold", steps=1)
    own = toy.ppo(tmp_path / "own", "--label_rm", toy.label_rm, steps=1)
    given = toy.ppo(tmp_path / "given", "--label_rm", toy.label_rm, "--value_init", toy.rationale_rm, steps=1)
    assert "SFT backbone with a zero head" in zero
    assert f"value model: from {toy.label_rm}" in own and f"value model: from {toy.rationale_rm}" in given
    losses = [read_metrics(tmp_path / name, "judge/score")[0]["improve/value_loss"] for name in ("own", "given")]
    assert losses[0] != losses[1]


def test_what_is_sampled_is_what_is_scored_at_any_temperature(toy, tmp_path):
    toy.ppo(tmp_path / "ppo", "--reward", "gold", "--temperature", 0.6, "--learning_rate", 1e-3, steps=3)
    lines = read_metrics(tmp_path / "ppo", "judge/score")
    assert max(line["improve/first_ratio_error"] for line in lines) < 1e-5
    assert max(line["analyse/logprob_gap"] for line in lines) < 1e-4
    assert abs(lines[0]["analyse/kl_sequence"]) < 1e-5  # policy and reference are still the same model


def test_adaptive_kl_control_moves_the_coefficient(toy, tmp_path):
    control = ["--kl_control", "adaptive", "--kl_target", 6, "--kl_horizon", 100]
    toy.ppo(tmp_path / "ppo", "--reward", "gold", *control, steps=3)
    lines = read_metrics(tmp_path / "ppo", "judge/score")
    assert lines[0]["shape/kl_coef"] == 0.1
    for before, after in zip(lines, lines[1:]):  # Ziegler et al.: relative error, clipped to +-0.2
        error = max(-0.2, min(0.2, before["analyse/kl_sequence"] / 6 - 1))
        assert after["shape/kl_coef"] == pytest.approx(before["shape/kl_coef"] * (1 + error * 8 / 100), rel=1e-5)


def test_config_file_and_a_flag_over_it(toy, tmp_path):
    config = {
        "policy": str(toy.sft),
        "reward": "gold",
        "steps": 2,
        "rollout_prompts": 4,
        "eval_rows": 4,
        "max_new_tokens": 12,
        "kl_coef": 0.3,
        "freeze_embeddings": False,
        "output_dir": str(tmp_path / "ppo"),
    }
    (tmp_path / "ppo.yaml").write_text(json.dumps(config))
    run(train_ppo.main, "--config", tmp_path / "ppo.yaml", "--kl_coef", "0.05")
    lines = read_metrics(tmp_path / "ppo", "judge/score")
    assert [line["episodes"] for line in lines] == [4, 8] and lines[0]["shape/kl_coef"] == 0.05
    recorded = read_record(tmp_path / "ppo" / "last")["config"]
    assert recorded["kl_coef"] == 0.05 and recorded["reward"] == "gold" and recorded["freeze_embeddings"] is False


def test_frozen_embeddings_stay(toy, tmp_path):
    moved = {}
    for flag in ("--freeze_embeddings", "--no-freeze_embeddings"):
        toy.ppo(tmp_path / flag, "--reward", "gold", flag)
        before, after = weights(toy.sft), weights(tmp_path / flag / "last")
        moved[flag] = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved["--no-freeze_embeddings"] - moved["--freeze_embeddings"] == {"model.embed_tokens.weight"}


def test_default_directories_lead_from_stage_to_stage(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = "--epochs 1 --max_new_tokens 12".split()
    run(train_sft.main, *toy.data, "--model", toy.sft, *small, "--learning_rate", 1e-4, "--dropout", 0)
    task = ["--task", toy.task]  # a task file: the runs are named by the task, not by the file's path
    run(train_rm.main, *task, *small)
    run(train_rm.main, *task, *small, "--pairs", "rationale")
    run(train_ppo.main, *task, *toy.ppo_flags, "--reward", "mixed", "--threshold", "q0.9")
    assert sorted(os.listdir("runs/toy")) == ["ppo-mixed", "rm-label", "rm-rationale", "sft"]
    policies = ["runs/toy/sft", "runs/toy/ppo-mixed", "runs/toy/ppo-mixed/last"]
    output = run(evaluate.main, "--models", *policies, "--output_dir", "evaluation")
    step = read_record("runs/toy/ppo-mixed/best")["step"]
    assert f"runs/toy/ppo-mixed is a PPO run: its policy is runs/toy/ppo-mixed/best (step {step})" in output
    results = json.loads(Path("evaluation/evaluate.json").read_text())
    assert [row["model"] for row in results] == ["runs/toy/sft", "runs/toy/ppo-mixed/best", "runs/toy/ppo-mixed/last"]


def test_overwrite_replaces_a_run_and_leaves_nothing_of_it(toy, tmp_path):
    toy.ppo(tmp_path / "ppo", "--reward", "gold", steps=3)
    (tmp_path / "ppo" / "last" / "left_over").write_text("x")
    toy.ppo(tmp_path / "ppo", "--reward", "gold", "--overwrite", steps=1)
    assert [line["step"] for line in read_metrics(tmp_path / "ppo", "judge/score")] == [1]
    assert not (tmp_path / "ppo" / "last" / "left_over").exists()


# ---- PPO: what must not happen unseen --------------------------------------------------------------------------------


def reward_module(tmp_path, monkeypatch, body):
    """A module of the user's own with `reward(samples)`, under a name of the test's own; returns --reward's value."""
    name = f"own_{tmp_path.name}"
    head = "import torch\ncalls = []\n\ndef reward(samples):\n    calls.append(1)\n"
    (tmp_path / f"{name}.py").write_text(f"{head}    {body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    return f"{name}:reward"


@pytest.mark.parametrize("bad_step, value", [(1, "nan"), (2, "nan"), (2, "inf")])
def test_non_finite_reward_stops_before_the_update(toy, tmp_path, monkeypatch, capsys, bad_step, value):
    body = f"return torch.tensor([float('{value}') if len(calls) > {bad_step} else 0.5] + [0.0] * 7)"
    flags = ["--reward", reward_module(tmp_path, monkeypatch, body), "--learning_rate", 1e-3]
    with pytest.raises(SystemExit) as stop:
        toy.ppo(tmp_path / "ppo", *flags, steps=3)
    message = capsys.readouterr().err
    assert stop.value.code == 1 and message.startswith(f"error: step {bad_step}: ") and message.count("\n") == 1
    assert f"the label score is {value} (prompt train.jsonl:" in message and str(tmp_path / "ppo" / "last") in message
    assert generates(tmp_path / "ppo" / "last") and read_record(tmp_path / "ppo" / "last")["step"] == bad_step - 1
    assert same_weights(tmp_path / "ppo" / "last", toy.sft) == (bad_step == 1)
    assert len(read_metrics(tmp_path / "ppo", "judge/score")) == bad_step - 1
    failed = load_file(tmp_path / "ppo" / "failed_batch.safetensors")
    assert failed["sequences"].shape[0] == failed["logprobs"].shape[0] == 8
    assert str(float(failed["scores"][0])) == value and torch.isfinite(failed["logprobs"]).all()
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "ppo" / "last").values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_makes_no_step(value):
    """A finite loss can have one; clipping it would put NaN into every weight."""
    model = torch.nn.Linear(2, 1)
    before = model.weight.detach().clone()
    optimizer = Optimizer(model, 0.1, 10)
    model(torch.ones(1, 2)).sum().backward()
    model.weight.grad[0, 1] = value
    with pytest.raises(RunError, match=f"norm is {value}"):
        optimizer.clip_gradient()
        optimizer.step()
    assert torch.equal(model.weight, before)


def test_non_finite_loss_stops_sft_and_rm(toy, tmp_path, monkeypatch, capsys):
    starts = {
        "sft_loss": (train_sft, [*toy.data, "--model", toy.base]),
        "rm_loss": (train_rm, ["--policy", toy.sft, "--label_pairs", "paper"]),
    }
    for name, (module, flags) in starts.items():
        original, calls = getattr(module, name), []

        def broken(*arguments, original=original, calls=calls):
            calls.append(1)
            return original(*arguments) * (float("nan") if len(calls) == 4 else 1.0)

        monkeypatch.setattr(module, name, broken)
        with pytest.raises(SystemExit) as stop:
            run(module.main, *flags, "--batch_size", 16, "--epochs", 4, *ANSWER, "--output_dir", tmp_path / name)
        message = capsys.readouterr().err
        assert stop.value.code == 1 and "step 4" in message and "nan" in message and str(tmp_path / name) in message
        assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / name).values())


def test_dropout_in_the_policys_config_is_off_in_every_pass(toy, tmp_path):
    policy = family_policy("gpt2", tmp_path, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
    assert json.loads((policy / "config.json").read_text())["attn_pdrop"] == 0.1
    toy.ppo(tmp_path / "ppo", *toy.data, "--reward", "gold", "--answer_format", "label", policy=policy)
    lines = read_metrics(tmp_path / "ppo", "judge/score")
    assert len(lines) == 2 and max(line["improve/first_ratio_error"] for line in lines) < 1e-5
    assert json.loads((tmp_path / "ppo" / "last" / "config.json").read_text())["attn_pdrop"] == 0.1


def test_a_ratio_that_is_not_one_stops_the_run(toy, tmp_path, monkeypatch, capsys):
    """What a dropout left on, or another temperature, would look like."""
    original = update.token_logprobs

    def shifted(*given, **more):
        return original(*given, **more) + (0.02 if torch.is_grad_enabled() else 0.0)

    monkeypatch.setattr(update, "token_logprobs", shifted)
    with pytest.raises(SystemExit) as stop:
        toy.ppo(tmp_path / "ppo", "--reward", "gold")
    message = capsys.readouterr().err
    assert stop.value.code == 1 and "error: step 1: the ratio" in message and "dropout" in message
    assert same_weights(tmp_path / "ppo" / "last", toy.sft)


@pytest.mark.parametrize("off, stops", [(2.0, True), (0.002, False)])
def test_a_sampler_that_is_not_the_policy(toy, tmp_path, monkeypatch, capsys, off, stops):
    """Log-probabilities recorded while sampling that the scoring pass does not find: stop, or warn."""
    original = train_ppo.generate

    def shifted(*arguments, **named):
        rollout = original(*arguments, **named)
        rollout.rollout_logprobs[rollout.response_mask] += off
        return rollout

    monkeypatch.setattr(train_ppo, "generate", shifted)
    words = f"log-probabilities recorded while sampling differ from those of the scoring pass by {off:.2g} (mean)"
    if stops:
        with pytest.raises(SystemExit) as stop:
            toy.ppo(tmp_path / "ppo", "--reward", "gold")
        assert stop.value.code == 1 and f"error: step 1: {words}" in capsys.readouterr().err
        assert same_weights(tmp_path / "ppo" / "last", toy.sft)
    else:
        assert f"warning: {words}" in toy.ppo(tmp_path / "ppo", "--reward", "gold")


def test_warning_when_the_policy_is_not_the_reward_models(toy, tmp_path):
    warning = "warning: the label reward model was measured on answers of another policy"
    assert warning not in toy.ppo(tmp_path / "same", "--label_rm", toy.label_rm, steps=1)
    shutil.copytree(toy.sft, tmp_path / "copy")  # the same weights elsewhere are the same policy
    assert warning not in toy.ppo(tmp_path / "moved", "--label_rm", toy.label_rm, policy=tmp_path / "copy", steps=1)
    other = tmp_path / "same" / "last"
    output = toy.ppo(tmp_path / "other", "--label_rm", toy.label_rm, policy=other, steps=1)
    assert f"{warning} than {other}" in output
    # The record's preview is of another policy: it is made anew, of the eight dev rows that this run looks at.
    assert "from train_rm.py" not in output and output.count("preview of PPO, on 8 dev rows:") == 1
    greedy = read_metrics(tmp_path / "other", "eval/accuracy")[0]["eval/accuracy"]
    assert re.search(rf"(?m)^ +greedy +{100 * greedy:.1f} %$", output)


# ---- every decoder family --------------------------------------------------------------------------------------------


def family_policy(family, tmp_path, **config):
    """A random policy of a family on disk, as from elsewhere: no record, the toy tokenizer."""
    tokenizer = toy_tokenizer()
    limit = {} if family == "bloom" else {"n_positions" if family == "gpt2" else "max_position_embeddings": 128}
    tiny_model(family, vocab_size=len(tokenizer), **limit, **config).save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_through_the_three_stages(toy, tmp_path, family):
    policy = family_policy(family, tmp_path)
    data = [*toy.data, "--answer_format", "label"]
    run(train_sft.main, *data, "--model", policy, "--epochs", 2, "--batch_size", 4, "--learning_rate", 1e-2,
        "--max_new_tokens", 16, "--output_dir", tmp_path / "sft")  # fmt: skip
    run(train_rm.main, "--policy", tmp_path / "sft", "--epochs", 1, "--batch_size", 64, "--learning_rate", 1e-3,
        "--max_new_tokens", 40, "--temperature", 2, "--output_dir", tmp_path / "rm")  # fmt: skip
    toy.ppo(tmp_path / "ppo", "--label_rm", tmp_path / "rm", "--max_new_tokens", 16, "--learning_rate", 1e-4,
            policy=tmp_path / "sft", steps=1)  # fmt: skip
    (line,) = read_metrics(tmp_path / "ppo", "judge/score")
    assert line["improve/first_ratio_error"] < 1e-5 and line["analyse/logprob_gap"] < 1e-4
    assert not same_weights(tmp_path / "sft", tmp_path / "ppo" / "last")
    assert generates(tmp_path / "ppo" / "last")


# ---- as a person runs it ---------------------------------------------------------------------------------------------


def test_ppo_as_a_process(toy, tmp_path):
    models = ["--policy", toy.sft, "--label_rm", toy.label_rm]
    flags = [*toy.ppo_flags, *models, "--steps", 1, "--output_dir", tmp_path / "ppo"]
    done = subprocess.run(
        [sys.executable, ROOT / "train_ppo.py", *map(str, flags)], cwd=tmp_path, capture_output=True, text=True,
        timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "step 1/1" in done.stdout and "Traceback" not in done.stderr
    assert (tmp_path / "ppo" / "last" / "model.safetensors").is_file()


# ---- on-policy pairs and the preview ---------------------------------------------------------------------------------


def test_the_label_reward_model_is_previewed(toy, tmp_path, capsys):
    """In its record, on the console, and again where PPO starts; a record that is damaged is named."""
    found = read_record(toy.label_rm)["report"]["preview"]
    assert found["prompts"] == len(DEV_ROWS) and found["samples"] == 16
    assert [point["n"] for point in found["curve"]] == [1, 2, 4, 8, 16]
    assert found["verdict"] in ("gain", "loss", "unclear")
    assert "preview of PPO, on 24 dev rows:" in toy.outputs["rm-label"] and "400 or more" in toy.outputs["rm-label"]
    assert "preview" not in read_record(toy.rationale_rm)["report"]
    rm = shutil.copytree(toy.label_rm, tmp_path / "rm")
    output = toy.ppo(tmp_path / "ppo", "--label_rm", rm, steps=1)
    assert "preview of PPO, from train_rm.py: Best-of-" in output
    record = json.loads((rm / "rllr.json").read_text())
    record["report"]["preview"] = {"verdict": "gain"}
    (rm / "rllr.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit):
        toy.ppo(tmp_path / "again", "--label_rm", rm, steps=1)
    assert "rllr.json: field 'report' is damaged" in capsys.readouterr().err


def test_labelled_rows_without_a_rationale(toy, tmp_path, capsys):
    """SFT learns from the 17 rows whose rationale it may use; the reward model's pairs come from all labelled rows,
    the written ones from those 17."""
    data = ["--task", toy.task, "--train_file", toy.train, "--eval_file", toy.dev]
    flags = [*data, "--model", toy.base, *toy.sft_flags, "--labelled", 40, "--rationale_rows", 18]
    output = run(train_sft.main, *flags, "--epochs", 60, "--output_dir", tmp_path / "sft")
    assert "rationales: 17 of the 36 rows to train on have one; SFT learns from these" in " ".join(output.split())
    assert read_record(tmp_path / "sft")["data"]["rationale_rows"] == 18
    flags = ["--policy", tmp_path / "sft", *toy.rm_flags, "--epochs", 1, "--cross_fit", "never", "--temperature", 1.5]
    run(train_rm.main, *flags, "--output_dir", tmp_path / "rm")
    pairs = read_lines(tmp_path / "rm" / "pairs.jsonl")
    prompts = {
        kind: {pair["prompt"] for pair in pairs if pair["kind"] == kind} for kind in ("label/paper", "label/flipped")
    }
    assert len(prompts["label/paper"]) == 17 and len(prompts["label/flipped"]) > 20
    written = {pair["prompt"] for pair in pairs if pair["kind"] == "label/on_policy"}
    assert written - prompts["label/paper"]
    nothing = ["--labelled", 40, "--rationale_rows", 18, "--held_out", 0.026, "--epochs", 2]  # one row, which has none
    sft, rm = tmp_path / "sft-none", tmp_path / "rm-none"
    run(train_sft.main, *data, "--model", toy.base, *toy.sft_flags, *nothing, "--output_dir", sft)
    with pytest.raises(SystemExit):
        run(train_rm.main, "--policy", sft, *toy.rm_flags, "--label_pairs", "paper", "--output_dir", rm)
    assert "--label_pairs paper: written pairs need rationales" in capsys.readouterr().err


@pytest.mark.parametrize("more, kinds, without", [
    ([], {"label/paper", "label/flipped"}, "grounded"),
    (["--label_pairs", "paper", "--grounded_pairs"], {"label/paper", "rationale/grounded"}, "flipped"),
    (["--pairs", "rationale"], {"rationale/other_text", "rationale/grounded"}, "label/"),
], ids=["label", "grounded", "rationale"])  # fmt: skip
def test_on_policy_pairs_are_sampled_once_and_kept(toy, tmp_path, more, kinds, without):
    """A run that goes on reads its pairs from its own files; the log says how often the samples are right."""
    flags = ["--policy", toy.sft, *toy.rm_flags, "--epochs", 1, "--save_every", 1, "--output_dir", tmp_path / "rm"]
    output = run(train_rm.main, *flags, *more, "--temperature", 1.5)
    assert re.search(r"sampled by the policy: \d+\.\d % right on the labelled rows, \d+\.\d % on rows held out", output)
    assert ("grounded: " in output) == ("rationale/grounded" in kinds)
    pairs = [(tmp_path / "rm" / name).read_text() for name in ("pairs.jsonl", "pairs_held_out.jsonl")]
    found = {json.loads(line)["kind"] for line in pairs[0].splitlines()}
    assert kinds <= found and not any(without in kind for kind in found)
    if "rationale/grounded" in pairs[1]:
        assert "rationale/grounded" in read_record(tmp_path / "rm")["report"]["pairs"]
    again = run(train_rm.main, "--resume", tmp_path / "rm", "--epochs", 2)
    assert "resumed from" in again and "right on the labelled rows" not in again
    assert pairs == [(tmp_path / "rm" / name).read_text() for name in ("pairs.jsonl", "pairs_held_out.jsonl")]


@pytest.mark.parametrize("metrics", ["[pearson]", "[spearman, accuracy]", "[macro_f1]"])
def test_every_stage_takes_a_task_whose_metrics_are_others(toy, tmp_path, metrics):
    """A scale, as stsb's: accuracy and macro F1 are not among what is measured."""
    task, names = tmp_path / "scale.yaml", {"good": "1", "bad": "0"}
    first = metrics.strip("[]").split(",")[0]
    task.write_text(
        f'name: scale\nlabels: ["0", "1"]\nprompt: "{{text}}"\nordinal: true\nmetric: {first}\nmetrics: {metrics}\n'
    )
    rows = [{"text": row["text"], "label": names[row["label"]]} for row in TRAIN_ROWS + DEV_ROWS]
    data = ["--task", task, "--train_file", write_rows(tmp_path / "train.jsonl", rows[:-16])]
    data += [
        "--eval_file",
        write_rows(tmp_path / "dev.jsonl", rows[-16:]),
        "--labelled",
        40,
        "--rationales",
        "evidence",
    ]
    out, base = tmp_path / "runs", tmp_path / "base"
    shutil.copytree(toy.base, base, ignore=shutil.ignore_patterns("rllr.json"))  # a model that knows no task
    more = ["--max_new_tokens", 24, "--output_dir"]
    run(train_sft.main, *data, "--model", base, "--epochs", 3, "--batch_size", 8, *more, out / "sft")
    run(train_rm.main, "--policy", out / "sft", "--epochs", 1, "--preview_rows", 8, *more, out / "rm-label")
    ppo = ["--policy", out / "sft", "--label_rm", out / "rm-label", "--steps", 2, "--rollout_prompts", 8]
    output = run(train_ppo.main, *ppo, *more, out / "ppo-label")
    assert re.search(rf"after +dev .*{first} ", output) and (out / "ppo-label" / "best").is_dir()
    assert first in run(evaluate.main, "--models", out / "sft", out / "ppo-label", *more, out / "evaluation")
    run(report.main, out)
    assert (out / "report.html").stat().st_size > 10_000
