"""What is recorded beside a model, and what a later stage takes from it."""

import json
from dataclasses import asdict

import pytest
import torch
from families import EOS, tiny_model, toy_tokenizer

from rllr.common.errors import InputError
from rllr.common.files import RECORD, RUN
from rllr.data.encoding import Encoder
from rllr.data.inherited import inherit
from rllr.data.splits import DataConfig
from rllr.model.loading import load_policy, load_tokenizer
from rllr.model.records import (
    check_same_task,
    make_record,
    moved_record,
    policy_directory,
    read_record,
    resolve_task,
    save_policy,
    task_of_record,
)
from rllr.tasks import TASKS, Task

OWN = Task("own", ("x", "y"), "{text} {instruction}", metric="macro_f1", answer_format="label")


def test_a_saved_policy_comes_back(tmp_path):
    model, tokenizer = tiny_model("llama", vocab_size=262), toy_tokenizer()
    model.generation_config.eos_token_id = [7, 9]
    encoder = Encoder(tokenizer, model)
    record = make_record(
        "sft", OWN, DataConfig(task="own.yaml", labelled=7), tmp_path, tiny=True, eval={"accuracy": 0.5}
    )
    save_policy(model, encoder, tmp_path / "a" / "b", record)
    loaded = load_policy(tmp_path / "a" / "b")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
    assert Encoder(load_tokenizer(tmp_path / "a" / "b"), loaded).stop_ids == [7, 9, EOS]  # with the one that is taught
    again = read_record(tmp_path / "a" / "b")
    assert again == json.loads(json.dumps(record)) and task_of_record(again) == OWN
    assert again["data"] == asdict(DataConfig(task="own.yaml", labelled=7)) and again["tiny"] is True
    encoder.stop_ids = [EOS]
    save_policy(model, encoder, tmp_path / "one", {})
    assert json.loads((tmp_path / "one" / "generation_config.json").read_text())["eos_token_id"] == EOS


def test_records_that_are_not_there_or_damaged(tmp_path):
    assert read_record(tmp_path) == read_record("organisation/model") == {} and task_of_record({}) is None
    task = asdict(OWN)
    for content, words in (
        ("{", "not valid JSON"),
        ("[]", "not a record of rllr"),
        ('{"data": 3}', "not a record of rllr"),
        (json.dumps({"task": {k: v for k, v in task.items() if k != "labels"}}), "not a record of rllr"),
        (json.dumps({"task": task | {"other": 1}}), "not a record of rllr"),
        (json.dumps({"task": "sst2"}), "not a record of rllr"),
    ):
        (tmp_path / RECORD).write_text(content)
        with pytest.raises(InputError, match=f"^{tmp_path / RECORD}: {words}"):
            read_record(tmp_path)


def test_resolve_task():
    record = json.loads(json.dumps(make_record("sft", OWN, DataConfig(task="tasks/own.yaml"), "d")))
    for name in (None, "own", "tasks/own.yaml"):  # a later stage needs no --task, and not the file either
        assert resolve_task(DataConfig(task=name), record, "d") == OWN
    assert resolve_task(DataConfig(answer_format="rationale"), record, "d").answer_format == "rationale"
    assert resolve_task(DataConfig(task="mrpc"), record, "d") == TASKS["mrpc"]
    assert (
        resolve_task(DataConfig(), {}, "d") == TASKS["demo"]
        and resolve_task(DataConfig(), {}, "d", "mr") == TASKS["mr"]
    )
    assert resolve_task(DataConfig(task="sst2", answer_format="label"), {}, "d").answer_format == "label"
    assert resolve_task(DataConfig(), {"task": asdict(OWN)}, "d") == OWN  # a record without data settings
    with pytest.raises(InputError, match="--task 'tasks/other'"):
        resolve_task(DataConfig(task="tasks/other"), record, "d")


def test_check_same_task():
    record = make_record("sft", OWN, DataConfig(), "d")
    check_same_task({}, TASKS["mr"], "--policy x")
    check_same_task(record, Task("renamed", OWN.labels, OWN.prompt), "--policy x")
    for other in (Task("own", ("x", "z"), OWN.prompt), Task("own", OWN.labels, "{text}?")):
        with pytest.raises(InputError, match=r"^--policy x: was trained on task 'own' \(labels x, y\), not on 'own'"):
            check_same_task(record, other, "--policy x")


def test_inherit_fills_what_is_not_given_and_names_contradictions():
    record = {"data": asdict(DataConfig(task="sst2", train_file="a.jsonl", labelled=100, data_seed=0, held_out=0.2))}
    config = DataConfig(train_file="b.jsonl", labelled=100, eval_file="e.jsonl")
    assert inherit(config, record, "runs/sft") == []  # files are compared by what they hold
    assert config == DataConfig(
        task="sst2", train_file="b.jsonl", eval_file="e.jsonl", labelled=100, data_seed=0, held_out=0.2
    )
    assert config.inherited == dict.fromkeys(("task", "data_seed", "held_out"), "runs/sft/rllr.json")
    assert inherit(DataConfig(labelled=3), record, "d") == ["--labelled 3 (the policy was trained with 100)"]
    assert inherit(DataConfig(labelled=3), {}, "d") == []


def test_a_share_that_the_policy_left_to_its_default_is_contradicted_too():
    record = {"data": asdict(DataConfig(task="sst2", train_file="a.jsonl", data_seed=0))}
    assert inherit(DataConfig(held_out=0.3, labelled=50), record, "d") == [
        "--labelled 50 (the policy was trained with all)", "--held_out 0.3 (the policy was trained with 0.1)"
    ]  # fmt: skip
    assert inherit(DataConfig(held_out=0.1), record, "d") == []


def test_a_ppo_runs_directory_stands_for_its_best_policy(tmp_path):
    lines = []
    run, best = tmp_path / "ppo-label", tmp_path / "ppo-label" / "best"
    best.mkdir(parents=True)
    assert policy_directory(None) is None and policy_directory("organisation/model") == "organisation/model"
    assert policy_directory(str(run), lines.append) == str(run)  # no run.json: no run
    (run / RUN).write_text('{"stage": "ppo"}')
    with pytest.raises(InputError, match=f"^{run}: this PPO run has saved no policy yet; let it run, or name another"):
        policy_directory(run, lines.append)
    (best / RECORD).write_text('{"step": 40}')
    assert policy_directory(run, lines.append) == str(best)
    assert lines == [f"{run} is a PPO run: its policy is {best} (step 40)"]
    assert policy_directory(str(best), lines.append) == str(best) and len(lines) == 1
    (run / RUN).write_text('{"stage": "sft"}')  # its model lies in the directory itself, once there is one
    with pytest.raises(InputError, match=f"^{run}: this run has saved no model yet; .* train_sft.py --resume {run}$"):
        policy_directory(str(run), lines.append)
    (run / RECORD).write_text("{}")
    assert policy_directory(str(run), lines.append) == str(run)
    (run / RECORD).unlink()
    (run / RUN).write_text("[]")
    assert policy_directory(str(run), lines.append) == str(run) and len(lines) == 1


def test_a_moved_record_leads_to_the_same_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("data", "runs/one", "further/down/two"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "data" / "train.jsonl").write_text("")
    data = {"train_file": "../../data/train.jsonl", "eval_file": "/elsewhere/dev.jsonl", "labelled": 4, "task": "sst2"}
    record = {"stage": "sft", "data": data, "config": {"model": "../gone", "policy": "who/llm"}, "rows": None}
    moved = moved_record(record, "runs/one", "further/down/two")
    assert moved["data"] == data | {"train_file": "../../../data/train.jsonl"}
    assert moved["config"] == {"model": str(tmp_path / "runs" / "gone"), "policy": "who/llm"}
    assert (moved["stage"], moved["rows"]) == ("sft", None)
