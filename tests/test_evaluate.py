"""Metrics against values by hand and slow loops, intervals and tests, and the two commands on tiny trained models."""

import io
import json
import math
import os
import random
import shutil
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from families import tiny_model, toy_tokenizer
from toy_runs import typed

from rllr import evaluate, predict
from rllr.answers import Answer, answer_rows
from rllr.data.encoding import Encoder
from rllr.data.splits import DataConfig
from rllr.evaluate import compare, show_samples, table
from rllr.logprobs import sft_loss
from rllr.metrics import (
    accuracy,
    answer_metrics,
    bootstrap_interval,
    macro_f1,
    mcnemar,
    metric_line,
    pearson,
    row_values,
    spearman,
    wilson_interval,
)
from rllr.model.records import make_record, read_record, save_policy
from rllr.pairs import Pair
from rllr.report.reward_report import pair_report
from rllr.tasks import TASKS, Example, load_task

SST2, STSB, AGNEWS, APPS = TASKS["sst2"], TASKS["stsb"], TASKS["agnews"], TASKS["app_reviews"]


def answers(labels):
    return [Answer(f"Label: {label}" if label else "?", label, label is None) for label in labels]


def examples(labels, scores=None):
    scores = scores or [None] * len(labels)
    return [Example(str(i), "t", "u", label, score) for i, (label, score) in enumerate(zip(labels, scores))]


# ---- metrics


def test_accuracy():
    assert accuracy(["a", "b", "b", "a"], ["a", "b", "a", None]) == 0.5
    assert accuracy(["a"], [None]) == 0


def test_macro_f1_by_hand():
    """a: 2 right of 3 claims and 3 cases, F1 2/3. b: 1 of 2 and 2, 1/2. c: claimed once, no case, 0. d: neither."""
    gold, predicted = ["a", "a", "a", "b", "b"], ["a", "a", "b", "b", "a"]
    assert macro_f1(gold, predicted, "ab") == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert macro_f1(gold, predicted, "abd") == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert macro_f1([*gold, "a"], [*predicted, "c"], "abcd") == pytest.approx((4 / 7 + 1 / 2 + 0) / 3)
    assert macro_f1(["a", "b"], [None, "b"], "ab") == pytest.approx(0.5)  # a parse failure claims no label


def slow_macro_f1(gold, predicted, labels):
    scores = []
    for label in labels:
        tp = fp = fn = 0
        for g, p in zip(gold, predicted):
            tp += g == label and p == label
            fp += g != label and p == label
            fn += g == label and p != label
        if tp + fp + fn == 0:
            continue
        precision, recall = tp / (tp + fp) if tp + fp else 0, tp / (tp + fn) if tp + fn else 0
        scores.append(2 * precision * recall / (precision + recall) if precision + recall else 0)
    return sum(scores) / len(scores)


def slow_pearson(x, y):
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    covariance = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y))
    return covariance / math.sqrt(math.fsum((a - mean_x) ** 2 for a in x) * math.fsum((b - mean_y) ** 2 for b in y))


def slow_ranks(x):
    """Of equal values each gets the mean of the places they take together."""
    return [sum(other < value for other in x) + (sum(other == value for other in x) + 1) / 2 for value in x]


@pytest.mark.parametrize("seed", range(5))
def test_metrics_agree_with_slow_loops(seed):
    rng = random.Random(seed)
    gold = rng.choices(AGNEWS.labels, k=40)
    predicted = [rng.choice([label, *AGNEWS.labels, None]) for label in gold]
    assert macro_f1(gold, predicted, AGNEWS.labels) == pytest.approx(slow_macro_f1(gold, predicted, AGNEWS.labels))
    x = [rng.gauss(0, 1) for _ in range(30)]
    y = [value + rng.gauss(0, 1) for value in x]
    assert pearson(x, y) == pytest.approx(slow_pearson(x, y))
    tied = [rng.randrange(5) for _ in range(30)]
    assert spearman(tied, y) == pytest.approx(slow_pearson(slow_ranks(tied), slow_ranks(y)))
    assert spearman(tied, tied[::-1]) == pytest.approx(slow_pearson(slow_ranks(tied), slow_ranks(tied[::-1])))


def test_correlations_by_hand():
    """x = 1 2 3 4, y = 1 3 2 4: deviations' products sum to 4, squares to 5 and 5."""
    assert pearson([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert pearson([1, 2, 3], [-10, -20, -30]) == pytest.approx(-1)
    assert spearman([1, 2, 3, 4], [1, 10, 5, 1000]) == pytest.approx(0.8)
    # Ties: the ranks of 1 2 2 4 are 1 2.5 2.5 4; against 1 2 3 4 that is 4.5 / sqrt(4.5 * 5).
    assert spearman([1, 2, 2, 4], [10, 20, 30, 40]) == pytest.approx(4.5 / math.sqrt(22.5))


@pytest.mark.parametrize("correlation", [pearson, spearman])
def test_a_constant_side_has_correlation_zero(correlation):
    for constant in (3, 0.1, 0.7):
        assert correlation([constant] * 3, [1, 2, 3]) == correlation([1, 2, 3], [constant] * 3) == 0
        assert correlation([constant] * 7, [0.1] * 7) == 0


def test_parse_failures_are_wrong_and_counted():
    scores = answer_metrics(SST2, examples(["negative", "positive"] * 2), answers(["negative", None, None, "negative"]))
    # negative: 1 right of 2 claims and 2 cases, F1 1/2; positive: 0
    assert scores == {"accuracy": 0.25, "macro_f1": 0.25, "parse_failures": 0.5}


def test_row_values_by_hand():
    """Right or wrong; for a correlation 1 - distance / 5. A parse failure is the label farthest away: 5, of 1.2."""
    assert row_values(SST2, examples(["positive"] * 3), answers(["positive", "negative", None])) == [1, 0, 0]
    assert row_values(APPS, examples(["1", "3"], [1.5, 3.0]), answers(["1", "4"])) == [1, 0]  # its metric is accuracy
    found = row_values(STSB, examples(["4", "1", "2"], [3.8, 1.2, 2.0]), answers(["4", None, "2"]))
    assert found == pytest.approx([1 - 0.2 / 5, 1 - 3.8 / 5, 1])


def test_for_correlations_a_parse_failure_is_the_label_farthest_from_the_gold_one():
    gold, predicted = ["4", "1", "2", "3", "5"], ["4", None, "2", None, None]
    targets = [3.8, 1.2, 2.4, 2.6, 5.0]
    scores = answer_metrics(STSB, examples(gold, targets), answers(predicted))
    stands_for = [4, 5, 2, 0, 0]  # 5 is farthest from 1.2, 0 from 2.6 and from 5.0
    assert scores["pearson"] == pytest.approx(slow_pearson(stands_for, targets))
    assert scores["spearman"] == pytest.approx(slow_pearson(slow_ranks(stands_for), slow_ranks(targets)))
    assert scores["accuracy"] == 0.4 and scores["parse_failures"] == 0.6
    assert list(scores) == ["pearson", "spearman", "accuracy", "parse_failures"]


def test_correlations_take_the_label_where_a_row_has_no_score():
    scores = answer_metrics(APPS, examples(["1", "3", "5"], [None, 2.5, None]), answers(["2", "3", "3"]))
    assert scores["pearson"] == pytest.approx(slow_pearson([2, 3, 3], [1, 2.5, 5]))


# ---- intervals and tests


def mean_of(values):
    return evaluate._Statistic(lambda rows: values[rows].mean(), len(values))


def test_the_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    rng, covered, widths = np.random.default_rng(0), 0, []
    for trial in range(100):
        low, high = bootstrap_interval(mean_of((rng.random(100) < 0.7).astype(float)), seed=trial, resamples=200)
        covered += low <= 0.7 <= high
        widths.append(high - low)
    assert 89 <= covered <= 99
    assert np.mean(widths) == pytest.approx(2 * 1.96 * math.sqrt(0.7 * 0.3 / 100), rel=0.1)


def test_the_bootstrap_hangs_on_its_seed_alone():
    values = np.arange(20.0)
    interval = bootstrap_interval(mean_of(values), seed=1)
    np.random.seed(5)
    assert bootstrap_interval(mean_of(values), seed=1) == interval != bootstrap_interval(mean_of(values), seed=2)
    assert bootstrap_interval(mean_of(np.ones(7))) == (1, 1)


@pytest.mark.parametrize(
    "only_first, only_second", [(0, 0), (1, 0), (3, 3), (10, 2), (2, 10), (0, 12), (60, 41), (7, 8)]
)
def test_mcnemar_is_the_exact_binomial_test(only_first, only_second):
    n, k = only_first + only_second, min(only_first, only_second)
    p = min(Fraction(1), 2 * sum(Fraction(math.comb(n, i), 2**n) for i in range(k + 1)))
    first = [True] * only_first + [False] * only_second + [True, True, False]
    second = [False] * only_first + [True] * only_second + [True, True, False]
    assert mcnemar(first, second) == pytest.approx(float(p), rel=1e-9)


@pytest.mark.parametrize(
    "share, n, low, high",
    [
        (0.5, 10, 0.2366, 0.7634),
        (0.9, 10, 0.5958, 0.9821),
        (0.0, 10, 0.0, 0.2775),
        (1.0, 10, 0.7225, 1.0),
        (0.8, 100, 0.7112, 0.8666),
    ],
)
def test_wilson_interval(share, n, low, high):
    """Values as in Agresti and Coull's formula: the shares p with |share - p| = z sqrt(p (1 - p) / n)."""
    interval = wilson_interval(share, n)
    assert interval == pytest.approx((low, high), abs=1e-4)
    for p in interval:
        assert abs(share - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / n), abs=1e-6)


def test_pair_report(capsys):
    pairs = [Pair("p", "a", "b", kind) for kind in ("x", "x", "y", "y")]
    chosen, rejected = torch.tensor([2.0, 0.0, 1.0, 1.0]), torch.tensor([1.0, 3.0, 1.0, 0.5])
    report = pair_report(pairs, chosen, rejected)
    assert {kind: (r["pairs"], r["accuracy"], r["margin"]) for kind, r in report.items()} == {
        "x": (2, 0.5, -1.0), "y": (2, 0.75, 0.25), "all": (4, 0.625, -0.375)
    }  # fmt: skip
    assert report["all"]["interval"] == pytest.approx(wilson_interval(0.625, 4))
    assert list(pair_report(pairs[:2], chosen[:2], rejected[:2])) == ["all"]
    assert "accuracy  62.5 %" in capsys.readouterr().out


# ---- comparison


def test_compare_on_the_same_rows():
    gold = ["negative", "positive"] * 20
    first = ["negative", "positive"] * 10 + ["positive", "negative"] * 10  # 20 of 40 right
    second = ["negative", "positive"] * 18 + [None] * 4  # 36 of 40, right wherever the first is
    rows = compare(SST2, examples(gold), {"A": answers(first), "B": answers(second)}, seed=3)
    assert [row["model"] for row in rows] == ["A", "B"] and [row["rows"] for row in rows] == [40, 40]
    assert [row["accuracy"] for row in rows] == [0.5, 0.9]
    assert (rows[1]["parse_failures"], rows[1]["truncated"]) == (0.1, 0.1)
    assert not {"difference", "mcnemar_p"} & set(rows[0])
    assert rows[1]["difference"] == pytest.approx(0.4)
    assert rows[1]["mcnemar_p"] == pytest.approx(2 / 2**16)  # 16 rows that only B has right
    # The difference is one of rows: 16 ones and 24 zeros.
    low, high = bootstrap_interval(mean_of(np.array([0.0] * 24 + [1.0] * 16)), seed=9)
    assert rows[1]["difference_interval"] == pytest.approx((low, high), abs=0.03)
    assert rows[0]["interval"] == bootstrap_interval(mean_of(np.array([1.0] * 20 + [0.0] * 20)), seed=3)


def test_a_model_does_not_differ_from_itself():
    gold = [str(i % 6) for i in range(30)]
    given = answers([str((i * i) % 6) for i in range(30)])
    rows = compare(STSB, examples(gold), {"A": given, "B": given})
    assert rows[1]["difference"] == 0 and rows[1]["difference_interval"] == (0, 0) and rows[1]["mcnemar_p"] == 1
    low, high = rows[0]["interval"]
    assert low < rows[0]["pearson"] < high


def test_what_people_see(capsys):
    rows = compare(SST2, examples(["negative"] * 4), {"one": answers(["negative"] * 4), "two": answers([None] * 4)})
    lines = table(SST2, rows).split("\n")
    assert lines[1].split() == "one 100.0 % 100.0 .. 100.0 0.0 %".split()
    assert lines[2].endswith("-100.0 (-100.0 .. -100.0), McNemar p 0.12")
    assert metric_line({"pearson": 0.5, "accuracy": 0.123, "parse_failures": 0, "epoch": 1}) == (
        "accuracy 12.3 %  pearson 0.500  parse_failures 0.0 %"
    )
    show_samples(SST2, examples(["negative"] * 3), answers([None, "positive", "positive"]), 2)
    shown = capsys.readouterr().out
    assert "parse failure (gold: negative)" in shown and shown.count("answer") == 2
    assert "0.500" in table(STSB, [{"model": "m", "pearson": 0.5, "interval": (0.25, 0.75), "parse_failures": 0}])


# ---- the commands

TEXTS = {"good": "positive", "bad": "negative", "fine": "positive", "poor": "negative"}


def trained(directory, task, said, record=True):
    """A tiny model that has learnt by heart what to say about each of TEXTS, saved as a stage would."""
    torch.manual_seed(0)
    tokenizer = toy_tokenizer()
    model = tiny_model("llama", vocab_size=262, max_position_embeddings=256, scale=1.0)
    encoder = Encoder(tokenizer, model)
    rows = [(encoder.prompt_ids(task.render_prompt(text)), encoder.answer_ids(said[text])) for text in TEXTS]
    tokens = sum(len(answer) for _, answer in rows)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _step in range(400):
        loss = sft_loss(model, rows, tokens, encoder)
        if loss < 0.02:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    else:
        raise AssertionError("did not learn")
    save_policy(
        model, encoder, directory, make_record("sft", task, DataConfig(task="sst2"), directory) if record else {}
    )
    return str(directory)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """right: a label alone, always the gold one. rationale: right but for 'poor', which gets no label line."""
    folder = tmp_path_factory.mktemp("models")
    gold = {text: f"Label: {label}" for text, label in TEXTS.items()}
    reasons = {text: f"{text}\n{line}" for text, line in gold.items()} | {"poor": "none"}
    return {
        "right": trained(folder / "right", load_task("sst2", "label"), gold),
        "rationale": trained(folder / "rationale", SST2, reasons),
    }


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "dev.jsonl"
    path.write_text("".join(json.dumps({"text": t, "label": label, "id": t}) + "\n" for t, label in TEXTS.items()))
    return str(path)


def run(module, *argv):
    """Exit code of a command, in this process."""
    try:
        module.main([str(arg) for arg in argv])
    except SystemExit as ended:
        return ended.code
    return 0


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_come_in_the_order_of_the_rows(models):
    model, tokenizer = evaluate.load_policy(models["right"]), evaluate.load_tokenizer(models["right"])
    task, texts = load_task("sst2", "label"), list(TEXTS) * 3
    given = answer_rows(
        model, Encoder(tokenizer, model), task, [Example(t, t) for t in texts], max_new_tokens=20, batch_size=5
    )
    assert [(a.text, a.label, a.truncated) for a in given] == [(f"Label: {TEXTS[t]}", TEXTS[t], False) for t in texts]
    (short,) = answer_rows(model, Encoder(tokenizer, model), task, [Example("a", "good")], max_new_tokens=5)
    assert short == Answer("Label", None, True)


def test_evaluate_compares_two_models(models, data, tmp_path, capsys):
    """Each is asked in the answer format it was trained on."""
    output = tmp_path / "out"
    command = ["--eval_file", data, "--models", models["right"], models["rationale"], "--max_new_tokens", 24]
    assert run(evaluate, *command, "--output_dir", output) == 0
    first, second = json.loads((output / "evaluate.json").read_text())
    assert (first["accuracy"], first["macro_f1"], first["parse_failures"], first["rows"]) == (1, 1, 0, 4)
    assert (second["accuracy"], second["parse_failures"], second["truncated"]) == (0.75, 0.25, 0)
    assert second["model"] == models["rationale"] and second["difference"] == -0.25 and second["mcnemar_p"] == 1
    rows = lines_of(output / "answers-1.jsonl")
    assert [row["id"] for row in rows] == list(TEXTS) and [row["gold"] for row in rows] == list(TEXTS.values())
    assert rows[0] == {
        "model": models["rationale"], "id": "good", "gold": "positive", "label": "positive",
        "answer": "good\nLabel: positive", "truncated": False,
    }  # fmt: skip
    assert rows[3]["answer"] == "none" and rows[3]["label"] is None
    assert [row["answer"] for row in lines_of(output / "answers-0.jsonl")] == [f"Label: {v}" for v in TEXTS.values()]
    shown = capsys.readouterr().out
    assert "sst2, 4 rows (part eval), greedy answers" in shown and "100.0 %" in shown and "McNemar p 1" in shown


def test_what_evaluate_refuses(models, data, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(models["right"], other)
    (other / "rllr.json").write_text(
        json.dumps(make_record("sft", load_task("mr", "label"), DataConfig(task="mr"), other))
    )
    (tmp_path / "file").write_text("")
    right = ["--models", models["right"], "--eval_file", data]
    for argv, words in (
        (["--eval_file", data], "--models"),
        ([*right[:2], other, *right[2:]], f"{other}: was trained on task 'mr'"),
        (["--models", tmp_path / "none", "--eval_file", data], f"{tmp_path / 'none'}: no such model directory"),
        ([*right, "--part", "test"], "--part test"),
        ([*right, "--max_new_tokens", 0], "--max_new_tokens"),
        ([*right, "--max_new_tokens", 250], "more than the model's context of 256"),
        ([*right, "--output_dir", tmp_path / "file"], f"--output_dir {tmp_path / 'file'}: cannot be written"),
    ):
        assert run(evaluate, *argv) == 2
        assert words in capsys.readouterr().err


def test_predict_from_a_file_to_a_file(models, tmp_path, capsys):
    new, output = tmp_path / "new.jsonl", tmp_path / "labelled.jsonl"
    new.write_text("".join(json.dumps({"sentence": t, "id": f"no {i}"}) + "\n" for i, t in enumerate(TEXTS)))
    command = ["--model", models["rationale"], "--input", new, "--columns", "text=sentence", "--output", output]
    assert run(predict, *command) == 0
    rows = lines_of(output)
    assert rows[1] == {
        "id": "no 1", "text": "bad", "label": "negative", "rationale": "bad", "answer": "bad\nLabel: negative"
    }  # fmt: skip
    assert rows[3] == {
        "id": "no 3",
        "text": "poor",
        "label": None,
        "rationale": None,
        "answer": "none",
        "reason": "no readable label",
    }
    streams = capsys.readouterr()
    assert "4 rows, 1 of them without a label" in streams.err and streams.out == ""
    assert run(predict, *command) == 2 and "exists; give another name or --overwrite" in capsys.readouterr().err
    assert run(predict, *command, "--overwrite") == 0 and lines_of(output) == rows


def test_predict_writes_neither_over_what_it_reads_nor_under_another_formats_name(models, tmp_path, capsys):
    new = tmp_path / "new.jsonl"
    new.write_text('{"text": "good", "label": "positive"}\n')
    os.symlink(new, tmp_path / "link.jsonl")
    for output, words in (("new.jsonl", "is the file that is read"), ("link.jsonl", "is the file that is read"),
                          ("x.csv", "give a name that ends in .jsonl"), ("x", "give a name that ends in")):  # fmt: skip
        command = ["--model", models["right"], "--input", new, "--output", tmp_path / output, "--overwrite"]
        assert run(predict, *command) == 2 and words in capsys.readouterr().err
    assert new.read_text() == '{"text": "good", "label": "positive"}\n' and not (tmp_path / "x.csv").exists()


def test_predict_reads_other_encodings_from_standard_input(models, monkeypatch, capsys):
    """Whatever the console's encoding is."""

    def given(content):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))

    given("good\nGröße\n".encode("cp1252"))
    assert run(predict, "--model", models["right"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: standard input:2: not UTF-8 text (byte 8); it looks like cp1252: give --encoding")
    for content, flags in (
        ("good\nGröße\n".encode("cp1252"), ["--encoding", "cp1252"]),
        ("Größe".encode("utf-16"), []),
    ):
        given(content)
        assert run(predict, "--model", models["right"], *flags) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["text"] == "Größe"
    given(b'[{"text": "good"}]')
    assert run(predict, "--model", models["right"]) == 2 and "is a JSON array" in capsys.readouterr().err
    given(b"good;1")
    assert run(predict, "--model", models["right"], "--delimiter", ";") == 2
    assert "--delimiter is of CSV files" in capsys.readouterr().err


def test_predict_takes_a_missing_text_for_an_empty_one(models, monkeypatch, capsys):
    """As exporters write a null; of a field that no row has, the columns are named."""
    monkeypatch.setattr(sys, "stdin", typed('{"text": "good"}\n{"id": "x"}\n'))
    assert run(predict, "--model", models["right"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["label"] for row in rows] == ["positive", None] and rows[1]["reason"] == "empty text"
    monkeypatch.setattr(sys, "stdin", typed('{"txt": "good"}\n'))
    assert run(predict, "--model", models["right"]) == 2
    assert "no column for the field 'text'" in capsys.readouterr().err


def test_predict_from_standard_input_to_standard_output(models, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", typed('good\n\n{"text": "bad", "id": "mine"}\n  fine  \n'))
    assert run(predict, "--model", models["right"]) == 0
    streams = capsys.readouterr()
    rows = [json.loads(line) for line in streams.out.splitlines()]  # and nothing else on standard output
    assert [(row["text"], row["label"]) for row in rows] == [
        ("good", "positive"),
        ("", None),
        ("bad", "negative"),
        ("fine", "positive"),
    ]
    assert rows[2]["id"] == "mine" and rows[0]["rationale"] == "" and rows[1]["reason"] == "empty text"
    assert "4 rows, 1 of them without a label (label null, with the reason)" in streams.err


@pytest.mark.parametrize("flags", [[], ["--input", "-"]])
def test_predict_reads_a_byte_order_mark_as_none(models, monkeypatch, capsys, flags):
    """Else the first JSON line would be a text. Rows come out as they went in, also where none has a text."""
    monkeypatch.setattr(sys, "stdin", typed('\ufeff{"text": "bad"}\n{"text": " "}\n\n\n'))
    assert run(predict, "--model", models["right"], *flags) == 0
    assert [json.loads(line)["label"] for line in capsys.readouterr().out.splitlines()] == ["negative", None]
    monkeypatch.setattr(sys, "stdin", typed('{"text": ""}\n'))
    assert run(predict, "--model", models["right"], *flags) == 0
    assert json.loads(capsys.readouterr().out)["label"] is None


@pytest.mark.parametrize(
    "line, problem",
    [('{"text": 3}', "field 'text' must be text, got int 3"), ("{text", "begins with { but is not valid")],
)
def test_predict_names_the_line_of_standard_input(models, monkeypatch, capsys, line, problem):
    monkeypatch.setattr(sys, "stdin", typed(f"good\n\n{line}\n"))
    assert run(predict, "--model", models["right"]) == 2
    assert capsys.readouterr().err.startswith(f"error: standard input, line 3: {problem}")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_predict_prints_json_on_any_console(models, monkeypatch, encoding):
    """A text that the console cannot show comes out as JSON's escapes, and reads back."""
    console = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdin", typed("bad\nπ😀\n"))
    monkeypatch.setattr(sys, "stdout", console)
    assert run(predict, "--model", models["right"]) == 0
    console.flush()
    assert [json.loads(line)["text"] for line in console.buffer.getvalue().decode(encoding).splitlines()] == [
        "bad",
        "π😀",
    ]


def test_what_predict_refuses(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", typed("\n"))
    assert run(predict, "--model", models["right"]) == 2
    assert "standard input: is empty" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", typed('{"text": 3}\n'))
    assert run(predict, "--model", models["right"]) == 2
    assert "field 'text' must be text, got int 3" in capsys.readouterr().err
    assert run(predict, "--model", models["right"], "--task", "agnews") == 2
    assert "was trained on task 'sst2'" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", typed("good\n"))
    assert run(predict, "--model", models["right"], "--output", tmp_path / "none" / "x.jsonl") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_evaluate_and_predict_take_the_best_policy_of_a_ppo_run(models, data, tmp_path, monkeypatch, capsys):
    ppo = tmp_path / "ppo-label"
    ppo.mkdir()
    (ppo / "run.json").write_text('{"stage": "ppo"}')
    monkeypatch.setattr(sys, "stdin", typed("good\n"))
    for command in ([predict, "--model", ppo], [evaluate, "--eval_file", data, "--models", models["right"], ppo]):
        assert run(*command) == 2
        assert f"error: {ppo}: this PPO run has saved no policy yet; let it run" in capsys.readouterr().err
    shutil.copytree(models["right"], ppo / "best")
    assert run(predict, "--model", ppo) == 0
    streams = capsys.readouterr()
    assert json.loads(streams.out)["label"] == "positive" and f"its policy is {ppo / 'best'} (step" in streams.err
    assert run(evaluate, "--eval_file", data, "--models", models["right"], ppo, "--max_new_tokens", 24) == 0
    output = capsys.readouterr().out
    assert f"{ppo} is a PPO run: its policy is {ppo / 'best'} (step" in output and f"\n{ppo / 'best'}  " in output


def test_evaluate_says_what_a_ppo_run_promised_and_what_it_handed_back(toy, tmp_path):
    from toy_runs import run as output_of

    ppo = tmp_path / "ppo"
    said = toy.ppo(ppo, "--label_rm", toy.label_rm, steps=1)
    last_line = said.rstrip().splitlines()[-1]  # of train_ppo.py: which policy is handed back
    promise = next(line for line in said.splitlines() if "preview of PPO" in line).partition("train_rm.py: ")[2]
    output = output_of(evaluate.main, "--models", toy.sft, ppo, ppo / "last", "--part", "eval", "--max_new_tokens", 12)
    assert f"\n{ppo}/best:\n  before PPO: {promise}\n  after PPO: {last_line}\n" in output
    assert output.count("after PPO: ") == 1  # neither the SFT policy nor the last one is handed back
    assert read_record(ppo / "best")["promise"] == promise  # kept: the reward model may be gone or another one later
