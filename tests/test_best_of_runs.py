"""Best-of-n answers in `rllr.evaluate` and `rllr.predict`: which reward models fit, adapters, rows and seeds."""

import json
import shutil
from types import SimpleNamespace

import pytest
from families import toy_tokenizer
from toy_runs import DEV_ROWS, read_lines, run, write_rows

import train_rm
from rllr import evaluate, merge, predict
from rllr.best_of import load_chooser
from rllr.common.errors import InputError
from rllr.tasks import TASKS


def flags(label_rm):
    return SimpleNamespace(best_of=4, label_rm=label_rm, base=None)


def test_a_reward_model_that_does_not_fit(toy, tmp_path):
    def refused(directory, task, tokenizer=None, says=""):
        with pytest.raises(InputError, match=f"--label_rm {directory}: {says}"):
            load_chooser(flags(label_rm=str(directory)), task, [tokenizer] if tokenizer else [], "cpu")

    own = evaluate.load_tokenizer(toy.sft)
    task = evaluate.resolve_task(SimpleNamespace(task=None, answer_format=None), evaluate.read_record(toy.sft), toy.sft)
    refused(tmp_path / "none", task, own, "no such directory; train_rm.py makes one")
    refused(toy.label_rm, TASKS["sst2"], own, "was trained on task 'toy'")
    refused(toy.label_rm, task, toy_tokenizer(), "its tokenizer differs from the policy's")
    with pytest.raises(InputError, match="holds no reward or value model"):
        load_chooser(flags(label_rm=str(toy.sft)), task, [own], "cpu")
    assert load_chooser(flags(label_rm=str(toy.label_rm)), task, [own], "cpu").head.weight.requires_grad is False


# ---- the commands


def test_evaluate_adds_a_row_for_each_model(toy, tmp_path):
    flags = ["--models", toy.sft, toy.sft, "--eval_file", toy.dev, "--max_new_tokens", 12, "--best_of", 8]
    flags[2] = shutil.copytree(toy.sft, tmp_path / "copy")
    output = run(evaluate.main, *flags, "--label_rm", toy.label_rm, "--output_dir", tmp_path / "out")
    results = json.loads((tmp_path / "out" / "evaluate.json").read_text())
    names = [str(name) for model in (toy.sft, flags[2]) for name in (model, f"{model} best of 8")]
    assert [row["model"] for row in results] == names
    assert f"24 rows (part eval), greedy answers, and the best of 8 by {toy.label_rm}" in output
    assert results[1]["accuracy"] == results[3]["accuracy"] > 0.7 and results[1]["parse_failures"] == 0
    assert {(row["part"], row["rows_that_trained"], row["rows_that_chose"]) for row in results} == {("eval", 0, 24)}
    assert f"24 of these 24 rows chose {toy.sft}, {flags[2]} (they are" in output and "of 8 (they" not in output
    best, again = (read_lines(tmp_path / "out" / f"answers-{n}.jsonl") for n in (1, 3))
    assert [row["answer"] for row in best] == [row["answer"] for row in again]  # the same weights, seed and places
    predicted = predict_best(toy, tmp_path, "--seed", 0)
    assert [row["answer"] for row in predicted] == [row["answer"] for row in best]
    assert [row["answer"] for row in predict_best(toy, tmp_path, "--seed", 1)] != [row["answer"] for row in best]


def test_evaluate_knows_which_rows_trained_the_chooser(toy, tmp_path):
    """The policy's dev rows trained this reward model: what is measured on them is not new to both."""
    kept, met = (json.loads((directory / "rows.json").read_text()) for directory in (toy.sft, toy.label_rm))
    assert met == kept and len(met["labelled"]) > 20 and len(met["eval"]) == 24
    label_rm = shutil.copytree(toy.label_rm, tmp_path / "rm")
    (label_rm / "rows.json").write_text(json.dumps(met | {"labelled": met["labelled"] + met["eval"][:5]}))
    flags = ["--models", toy.sft, "--eval_file", toy.dev, "--max_new_tokens", 12, "--best_of", 2]
    output = run(evaluate.main, *flags, "--label_rm", label_rm)
    assert f"warning: 5 of these 24 rows trained {toy.sft} best of 2: what is measured on them" in output
    assert f"warning: 24 of these 24 rows chose {toy.sft}, {toy.sft} best of 2 (they are" in output


def predict_best(toy, tmp_path, *more):
    new, output = write_rows(tmp_path / "new.jsonl", [{"text": row["text"]} for row in DEV_ROWS]), tmp_path / "x.jsonl"
    flags = ["--model", toy.sft, "--input", new, "--output", output, "--overwrite", "--max_new_tokens", 12]
    run(predict.main, *flags, "--best_of", 8, "--label_rm", toy.label_rm, *more)
    return read_lines(output)


def test_an_adapter_chooses_as_its_merged_model_does(toy, tmp_path):
    flags = ["--policy", toy.sft, *toy.rm_flags, "--epochs", 1, "--lora_rank", 2, "--output_dir", tmp_path / "rm"]
    run(train_rm.main, *flags)
    run(merge.main, "--adapter", tmp_path / "rm", "--output_dir", tmp_path / "merged")
    adapter, merged = (predict_best(toy, tmp_path, "--label_rm", tmp_path / name) for name in ("rm", "merged"))
    assert adapter == merged
