"""Cross-fitting: no row is answered by a policy that saw its label; a fold is fine-tuned as train_sft.py does it."""

import json
import random
from types import SimpleNamespace

import pytest
import torch
from families import tiny_model, toy_tokenizer
from toy_runs import run

import train_rm
from rllr import cross_fit
from rllr.answers import Answer
from rllr.common.errors import InputError
from rllr.cross_fit import SETTINGS, cross_fitted_answers, fine_tune, folds_of, sft_recipe
from rllr.data.encoding import Encoder
from rllr.data.splits import DataConfig, load_splits
from rllr.model.loading import fingerprint, load_policy, load_tokenizer
from rllr.model.records import read_record, resolve_task
from rllr.rationales.factory import make_writer
from rllr.rm_pairs import is_cross_fit_due, share_right
from rllr.run.checkpoint import list_checkpoints, read_checkpoint
from rllr.tasks import Example


def rows(good, bad):
    return [Example(f"g{i}", f"text {i}", label="good") for i in range(good)] + [
        Example(f"b{i}", f"other {i}", label="bad") for i in range(bad)
    ]


@pytest.mark.parametrize("count", (2, 3, 5))
def test_folds_share_every_label_out_whatever_the_order(count):
    examples = rows(17, 8)
    folds = folds_of(examples, count)
    assert sorted(row.id for fold in folds for row in fold) == sorted(row.id for row in examples)
    for size, of in (
        (25, lambda row: True),
        (17, lambda row: row.label == "good"),
        (8, lambda row: row.label == "bad"),
    ):
        sizes = [sum(map(of, fold)) for fold in folds]
        assert sum(sizes) == size and max(sizes) - min(sizes) <= 1
    shuffled = random.Random(1).sample(examples, len(examples))
    assert folds_of(shuffled, count) == folds
    assert [row.id for row in folds[0]] != sorted(row.id for row in folds[0])  # by a hash, not in the file's order


def test_too_few_rows_for_the_folds():
    with pytest.raises(InputError, match=r"--folds 4: there are only 3 labelled rows"):
        folds_of(rows(2, 1), 4)


def test_a_recipe_names_the_base_from_where_it_lies(tmp_path):
    settings = dict.fromkeys(SETTINGS) | {"epochs": 3, "model": "tiny"}
    for name in ("base", "sft", "llm"):
        (tmp_path / name).mkdir()
    assert sft_recipe(tmp_path, {"stage": "sft", "config": settings}).model == str(tmp_path / "base")
    found = sft_recipe(tmp_path / "sft", {"stage": "sft", "config": settings | {"model": "../llm"}})
    assert (tmp_path / "llm").samefile(found.model) and found.epochs == 3
    hub = settings | {"model": "who/llm"}  # the name of a hub's model stays as it is
    assert sft_recipe(tmp_path, {"stage": "sft", "config": hub}).model == "who/llm"
    without = {name: value for name, value in settings.items() if name != "dropout"}
    for record in ({}, {"stage": "ppo", "config": settings}, {"stage": "sft"}, {"stage": "sft", "config": without}):
        with pytest.raises(InputError, match="has no record of train_sft.py"):
            sft_recipe(tmp_path, record)
    for gone in ("../gone", "/gone/base"):
        with pytest.raises(InputError, match=f"--policy {tmp_path}/sft: the folds .*gone.* is not there"):
            sft_recipe(tmp_path / "sft", {"stage": "sft", "config": settings | {"model": gone}})


def test_a_base_that_knows_labels_is_no_base_for_folds(toy, tmp_path):
    settings = dict.fromkeys(SETTINGS) | {"model": str(toy.sft)}
    with pytest.raises(InputError, match="its base, .*sft, has learnt labels before"):
        sft_recipe(tmp_path, {"stage": "sft", "config": settings})


def test_other_weights_than_sft_started_from_are_refused(toy, labelled):
    labelled.settings.base_fingerprint = "0" * 64
    with pytest.raises(InputError, match="not the weights that the policy was fine-tuned from"):
        fine_tune([], labelled.encoder, labelled.settings, "cpu")
    assert read_record(toy.sft)["base_fingerprint"] == fingerprint(load_policy(toy.base))


@pytest.fixture
def labelled(toy):
    """The toy's labelled rows, its encoder and the SFT run's settings."""
    record = read_record(toy.sft)
    config = DataConfig(task=str(toy.task), train_file=str(toy.train), eval_file=str(toy.dev), labelled=40, data_seed=0)
    config.policy = str(toy.sft)
    task = resolve_task(config, record, toy.sft)
    splits = load_splits(config, task, lambda line: None, record)
    encoder = Encoder(load_tokenizer(toy.sft), load_policy(toy.sft))
    return SimpleNamespace(rows=splits.labelled, task=task, encoder=encoder, settings=sft_recipe(toy.sft, record))


def test_a_fold_is_fine_tuned_as_train_sft_does_it(toy, labelled):
    """On all rows it ends, to the bit, where the SFT run's own last checkpoint stands."""
    task, encoder = labelled.task, labelled.encoder
    writer = make_writer("given", labelled.rows, task)
    encoded = encoder.rows(
        labelled.rows, task, lambda row: task.render_answer(row.label, writer.write(row, row.label)), 12
    )
    torch.manual_seed(5)
    before = torch.get_rng_state()
    policy = fine_tune(encoded, encoder, labelled.settings, "cpu")
    assert torch.equal(before, torch.get_rng_state()) and not policy.training
    expected = read_checkpoint(list_checkpoints(toy.sft)[0])["parts"]["model"]
    found = policy.state_dict()
    assert found.keys() - expected.keys() == {"lm_head.weight"}  # tied to the embeddings, stored once
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_no_row_is_answered_by_a_policy_that_saw_it(toy, labelled, monkeypatch, capsys):
    asked = {}

    def saw(encoded, encoder, settings, device, name=""):
        return {row.id for row in encoded}

    def ask(policy, examples, name):
        asked.update({row.id: policy for row in examples})
        return {row.id: [Answer("", row.label if name == "fold 1" else None, False)] for row in examples}

    monkeypatch.setattr(cross_fit, "fine_tune", saw)
    config = SimpleNamespace(policy=str(toy.sft), folds=3, max_new_tokens=12, shard=False, precision="fp32")
    job = SimpleNamespace(config=config, task=labelled.task, start_record=read_record(toy.sft), device="cpu")
    writer = make_writer("given", labelled.rows, labelled.task)
    answers = cross_fitted_answers(job, labelled.encoder, labelled.rows, writer, ask)
    everyone = {row.id for row in labelled.rows}
    assert answers.keys() == asked.keys() == everyone
    for number, fold in enumerate(folds_of(labelled.rows, 3)):
        for row in fold:
            assert asked[row.id] == everyone - {row.id for row in fold}
            assert (answers[row.id][0].label == row.label) == (number == 0)
    said = capsys.readouterr().out
    assert "fold 1/3: SFT on 24 rows, 30 epochs; 100.0 % of its samples on the other 12 rows are right" in said
    assert "fold 3/3: SFT on 24 rows, 30 epochs; 0.0 % of" in said


@pytest.mark.parametrize(
    "cross_fit, stage, learnt, new, due, said",
    [
        ("auto", "sft", 0.99, 0.72, True, "by heart: other policies"),
        ("auto", "sft", 0.85, 0.70, False, None),  # wrong in 15 of 100: just half as often as where it is new
        ("auto", "sft", 0.86, 0.70, True, "by heart: other policies"),
        ("auto", "sft", 1.0, 1.0, False, None),  # it makes no mistake anywhere
        ("auto", "ppo", 0.99, 0.72, False, "no cross-fitting: --policy"),
        ("never", "sft", 0.99, 0.72, False, "leave out --cross_fit never"),
        ("always", "sft", 0.70, 0.70, True, None),
    ],
)
def test_when_cross_fitting_is_due(cross_fit, stage, learnt, new, due, said, tmp_path, capsys):
    (tmp_path / "base").mkdir()
    config, right = SimpleNamespace(cross_fit=cross_fit, policy=tmp_path), {"labelled": learnt, "held out": new}
    record = {"stage": stage, "config": dict.fromkeys(SETTINGS) | {"model": "tiny"}}
    assert is_cross_fit_due(config, record, right) is due
    output = capsys.readouterr().out
    assert said in output if said else not output
    assert output.startswith("warning") is (bool(said) and not due)


def test_the_share_of_right_samples_counts_samples():
    examples = [Example("a", "x", label="good"), Example("b", "y", label="bad")]
    answers = {"a": [Answer("", "good", False)] * 3, "b": [Answer("", None, True)]}
    assert share_right(examples, answers) == 0.75


def test_folds_and_a_sampler_in_a_run(toy, tmp_path):
    """Each adds its answers to the pairs; a run that goes on samples nothing anew."""
    flags = ["--policy", toy.sft, *toy.rm_flags, "--epochs", 1, "--save_every", 1]
    more = {"plain": [], "sampler": ["--sampler", toy.sft], "folds": ["--cross_fit", "always"]}
    outputs, counts = {}, {}
    for name, extra in more.items():
        outputs[name] = run(train_rm.main, *flags, "--cross_fit", "never", *extra, "--output_dir", tmp_path / name)
        lines = (tmp_path / name / "pairs.jsonl").read_text().splitlines()
        counts[name] = sum(json.loads(line)["kind"] == "label/on_policy" for line in lines)
    assert "fold 1/2: SFT on 18 rows" in outputs["folds"] and "sampled by --sampler" in outputs["sampler"]
    assert "fold" not in outputs["sampler"].partition("sampled by")[2].partition("train:")[0]
    assert counts["sampler"] > counts["plain"] and counts["folds"] > counts["plain"]
    again = run(train_rm.main, "--resume", tmp_path / "folds", "--epochs", 2)
    assert "resumed from" in again and "right on the labelled" not in again and "fold 1" not in again


def test_a_sampler_with_another_tokenizer(toy, tmp_path, capsys):
    tiny_model("llama").save_pretrained(tmp_path / "other")
    toy_tokenizer().save_pretrained(tmp_path / "other")
    flags = ["--policy", toy.sft, *toy.rm_flags, "--sampler", tmp_path / "other", "--output_dir", tmp_path / "rm"]
    with pytest.raises(SystemExit):
        run(train_rm.main, *flags)
    assert "other: its tokenizer differs from the policy's" in capsys.readouterr().err
    assert not (tmp_path / "rm").exists()
