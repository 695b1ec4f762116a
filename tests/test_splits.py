"""Rows and the stages: which rows stay where, what the record says of them, and what the log says before anything is
trained."""

import json
import os
import shutil
from dataclasses import replace

import pytest
from toy_runs import ANSWER, DEV_ROWS, TRAIN_ROWS, read_lines, read_metrics, run, write_rows

import train_ppo
import train_rm
import train_sft
from rllr import audit, evaluate
from rllr.common.errors import InputError
from rllr.common.files import path_for_record, path_from_record
from rllr.data.encoding import Encoder
from rllr.data.met_rows import rows_digest
from rllr.data.row_reader import text_hash
from rllr.data.rows import load_examples
from rllr.data.split_report import tell_splits
from rllr.data.splits import DataConfig, Splits, load_splits
from rllr.tasks import Example, Task

TASK = Task("toy", ("good", "bad"), "{text}")
ROWS = [Example(f"r{i}", f"text {i}", label="good" if i % 2 else "bad") for i in range(40)]


def refused(capsys, main, *flags):
    with pytest.raises(SystemExit) as stop:
        run(main, *flags)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def here(toy, tmp_path, monkeypatch):
    """A directory of its own with relative paths: data/train.jsonl, data/dev.jsonl, toy.yaml and an SFT run on them."""
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "train.jsonl", TRAIN_ROWS)
    write_rows(tmp_path / "data" / "dev.jsonl", DEV_ROWS)
    shutil.copy(toy.task, tmp_path / "toy.yaml")
    monkeypatch.chdir(tmp_path)
    data = ["--task", "toy.yaml", "--train_file", "data/train.jsonl", "--eval_file", "data/dev.jsonl", "--labelled", 40]
    run(
        train_sft.main,
        *data,
        "--model",
        toy.base,
        "--epochs",
        2,
        "--learning_rate",
        1e-2,
        "--output_dir",
        "runs/sft",
        *ANSWER,
    )
    return tmp_path


RM = ["--epochs", 1, *ANSWER]


# ---- rows keep their stage -------------------------------------------------------------------------------------------


def test_a_reordered_file_changes_no_split(here):
    """The rows are known by what they say: the reward model trains on SFT's rows, wherever they stand by then."""
    before = run(train_rm.main, "--policy", "runs/sft", *RM, "--output_dir", "runs/rm")
    write_rows("data/train.jsonl", TRAIN_ROWS[::-1])
    after = run(train_rm.main, "--policy", "runs/sft", *RM, "--output_dir", "runs/rm2")
    assert "other rows" not in after and [json.loads(r)["rows"] for r in (
        (here / "runs" / name / "rllr.json").read_text() for name in ("rm", "rm2"))] == [
        json.loads((here / "runs" / "sft" / "rllr.json").read_text())["rows"]] * 2  # fmt: skip
    assert "rows: " in before


def test_rows_that_changed_are_refused_naming_both(here, capsys):
    changed = [
        dict(row, label={"good": "bad", "bad": "good"}[row["label"]]) if i == 5 else row
        for i, row in enumerate(TRAIN_ROWS)
    ]
    write_rows("data/train.jsonl", changed)
    message = refused(capsys, train_rm.main, "--policy", "runs/sft", *RM)
    assert "--train_file data/train.jsonl (from runs/sft/rllr.json): its rows are other ones now (digest " in message
    assert (
        "than those that the policy was trained with (digest " in message
        and "give the data by flag to use it on purpose" in message
    )
    write_rows("data/train.jsonl", TRAIN_ROWS)
    write_rows("data/dev.jsonl", DEV_ROWS[:-1])
    assert "--eval_file data/dev.jsonl (from runs/sft/rllr.json)" in refused(
        capsys, train_ppo.main, "--policy", "runs/sft", "--reward", "gold"
    )
    assert "--eval_file data/dev.jsonl (from runs/sft/rllr.json)" in refused(
        capsys, evaluate.main, "--models", "runs/sft"
    )


def test_other_data_by_flag_goes_without_the_rows_that_sft_knows(here):
    """12 new rows beside all of the old ones: what trained or evaluated SFT is left out and counted, from the
    evaluation rows as well."""
    new = [{"text": f"the dog {i} was tasty", "label": "good"} for i in range(12)]
    kept = json.loads((here / "runs" / "sft" / "rows.json").read_text())
    known = {name: len(hashes) for name, hashes in kept.items()}
    assert known == {"labelled": 36, "held_out": 4, "eval": 24, "test": 0}
    write_rows("data/more.jsonl", new + TRAIN_ROWS)
    write_rows("data/dev2.jsonl", new[:3] + TRAIN_ROWS[:20] + DEV_ROWS)
    flags = ["--train_file", "data/more.jsonl", "--eval_file", "data/dev2.jsonl", "--labelled", 11]
    output = run(train_ppo.main, "--policy", "runs/sft", *flags, "--reward", "gold", "--steps", 1,
        "--rollout_prompts", 4,
                 "--minibatches", 2, "--output_dir", "runs/ppo", *ANSWER)  # fmt: skip
    assert (
        "warning: --train_file data/more.jsonl: other rows than those that the policy was trained with, taken because "
        "a flag names them" in output
    )
    assert (
        f"--train_file data/more.jsonl: 40 of {len(new) + len(TRAIN_ROWS)} rows trained or evaluated the policy and "
        "are left out" in output
    )
    assert "of 47 rows trained the policy or are its test rows and are left out" in output
    handed_on = json.loads((here / "runs" / "ppo" / "last" / "rows.json").read_text())  # for a second round
    assert handed_on["labelled"] == kept["labelled"] and handed_on["held_out"] == kept["held_out"]
    assert set(kept["eval"]) < set(handed_on["eval"]) and len(handed_on["prompts"]) == 24 - 11


def test_sft_goes_on_with_other_rows(here):
    """With all of them, those that trained before, too, but its start's test rows stay test rows. Dev keeps none that
    trained, and what it hands on knows the rows of both."""
    new = [{"text": f"the dog {i} was tasty", "label": "good", "rationales": {"good": "tasty"}} for i in range(12)]
    rows = here / "runs" / "sft" / "rows.json"
    kept = json.loads(rows.read_text())
    kept["test"] = [text_hash(row["text"], None) for row in new[:2]]
    rows.write_text(json.dumps(kept))
    write_rows("data/more.jsonl", new + TRAIN_ROWS)
    write_rows("data/dev2.jsonl", TRAIN_ROWS[:20] + DEV_ROWS)
    flags = ["--model", "runs/sft", "--train_file", "data/more.jsonl", "--eval_file", "data/dev2.jsonl"]
    output = run(train_sft.main, *flags, "--epochs", 1, "--output_dir", "runs/on", *ANSWER)
    train, trained = len(new) - 2 + len(TRAIN_ROWS), {text_hash(row["text"], None) for row in TRAIN_ROWS[:20]}
    clean = len(DEV_ROWS) + len(trained - set(kept["labelled"]))
    said = "of the texts that runs/sft has met, 36 stay to train on, 4 stay held out, 2 stay test; the other rows"
    assert said in output and "2 for test" in output
    # 40 were used before, which is no limit now; of the 12 others and the 10 new ones a tenth is held out
    assert f"rows: {train - 4 - 2} labelled to train on" in output
    assert f"{clean} for evaluation (dev)" in output and clean < 44
    handed_on = json.loads((here / "runs" / "on" / "rows.json").read_text())
    assert all(set(kept[name]) <= set(handed_on[name]) for name in kept)
    assert len(handed_on["labelled"]) > len(kept["labelled"]) and set(kept["test"]) <= set(handed_on["test"])
    run(train_rm.main, "--policy", "runs/on", *RM, "--label_pairs", "paper", "--output_dir", "runs/rm")
    records = [json.loads((here / "runs" / name / "rllr.json").read_text())["rows"] for name in ("on", "rm")]
    assert records[0] == records[1] and len(records[0]) == 6  # read for train and eval, and four splits
    assert json.loads((here / "runs" / "rm" / "rows.json").read_text()) == handed_on


def test_a_resumed_run_keeps_its_data_by_flag(here):
    """Which settings were given is kept, so that the data of the first command is no surprise to the second."""
    new = [
        {"text": f"the dog {i} was tasty", "label": "good", "rationales": {"good": "tasty", "bad": "dog"}}
        for i in range(150)  # few of their sampled answers end: the policy is barely trained
    ]
    write_rows("data/more.jsonl", new)
    flags = ["--train_file", "data/more.jsonl", "--labelled", 20, *RM, "--output_dir", "runs/rm"]
    assert "other rows than those" in run(train_rm.main, "--policy", "runs/sft", *flags)
    output = run(train_rm.main, "--resume", "runs/rm", "--epochs", 2)
    assert "resumed from" in output and "other rows than those" in output


def test_nothing_left_is_an_error(here, capsys):
    write_rows("data/only.jsonl", DEV_ROWS)
    message = refused(capsys, train_rm.main, "--policy", "runs/sft", "--train_file", "data/only.jsonl", *RM)
    assert "--train_file data/only.jsonl: every row of it trained or evaluated the policy; give other rows" in message


def test_evaluate_warns_of_rows_that_trained(here):
    output = run(evaluate.main, "--models", "runs/sft", "--eval_file", "data/train.jsonl", "--max_new_tokens", 12)
    assert "warning: 36 of these 52 rows trained runs/sft: what is measured on them says little" in output
    assert "warning: 4 of these 52 rows chose runs/sft (they are dev or held-out rows of it)" in output
    output = run(evaluate.main, "--models", "runs/sft", "--max_new_tokens", 12)
    assert "trained runs/sft" not in output and output.endswith(
        "warning: 24 of these 24 rows chose runs/sft (they are dev or held-out rows of it): its figure is a little too "
        "good; give rows that did neither as --test_file\n"
    )


def test_test_rows_train_and_choose_nothing(here, toy, monkeypatch):
    """Of 52 rows a fifth is set aside: no stage so much as reads them, and `evaluate` takes them unasked."""
    read = {}

    def fit(encoder, examples, *arguments):
        read.setdefault(stage, set()).update(row.id for row in examples)
        return fitted(encoder, examples, *arguments)

    fitted = Encoder.fit
    monkeypatch.setattr(Encoder, "fit", fit)
    write_rows("data/train.jsonl", [row | {"id": f"r{i}"} for i, row in enumerate(TRAIN_ROWS)])
    rows = load_splits(DataConfig(train_file="data/train.jsonl", test_share=0.2), TASK, lambda line: None).test
    test = {row.id for row in rows}
    data = ["--task", "toy.yaml", "--train_file", "data/train.jsonl", "--eval_file", "data/dev.jsonl"]
    sft = [*data, "--labelled", 30, "--test_share", 0.2, "--model", toy.base, "--epochs", 6, *ANSWER]
    ppo = ["--reward", "gold", "--steps", 2, "--rollout_prompts", 4, "--minibatches", 2, *ANSWER]
    stage = "sft"
    run(train_sft.main, *sft, "--learning_rate", 1e-2, "--output_dir", "runs/with-test")
    stage = "rm"
    run(train_rm.main, "--policy", "runs/with-test", *RM, "--output_dir", "runs/rm")
    stage = "ppo"
    run(train_ppo.main, "--policy", "runs/with-test", *ppo, "--output_dir", "runs/ppo")
    assert len(test) == 10 and all(not ids & test for ids in read.values())
    everything = {f"r{i}" for i in range(52)} | {row.id for row in load_examples("data/dev.jsonl", TASK)}
    assert read["rm"] == everything - test and read["sft"] < read["rm"] and read["ppo"] < read["rm"]
    for name in ("with-test", "ppo/last"):
        kept = json.loads((here / "runs" / name / "rows.json").read_text())
        assert len(kept["test"]) == 10 and not set(kept["test"]) & {h for n in kept if n != "test" for h in kept[n]}
    stage = "evaluate"
    models = ["--models", "runs/with-test", "runs/ppo/last", "--max_new_tokens", 12]
    output = run(evaluate.main, *models, "--output_dir", "out")
    assert (
        "10 rows (part test), greedy answers" in output and "rows chose" not in output and "rows trained" not in output
    )
    assert {row["id"] for row in read_lines("out/answers-1.jsonl")} == test == read["evaluate"]
    assert {row["part"] for row in json.loads((here / "out" / "evaluate.json").read_text())} == {"test"}
    output = run(evaluate.main, *models, "--part", "eval")
    assert "24 of these 24 rows chose runs/with-test, runs/ppo/last (they are" in output and "use --part test" in output
    output = run(evaluate.main, *models, "--eval_file", "data/train.jsonl")
    assert "warning: 27 of these 52 rows trained runs/with-test: " in output  # of 30 labelled rows 3 are held out
    assert "warning: 39 of these 52 rows trained runs/ppo/last: " in output  # the 12 prompts as well


# ---- paths -----------------------------------------------------------------------------------------------------------


def test_paths_are_kept_from_where_the_record_lies(here, monkeypatch):
    """A later stage may run anywhere, where another file of that name lies, and the whole may be moved."""
    record = json.loads((here / "runs" / "sft" / "rllr.json").read_text())
    assert record["data"]["train_file"] == "../../data/train.jsonl" and record["data"]["task"] == "../../toy.yaml"
    elsewhere = here / "elsewhere"
    (elsewhere / "data").mkdir(parents=True)
    write_rows(elsewhere / "data" / "train.jsonl", DEV_ROWS)
    monkeypatch.chdir(elsewhere)
    output = run(train_rm.main, "--policy", "../runs/sft", *RM, "--output_dir", "rm", "--save_every", 1)
    assert "../data/train.jsonl: 52 rows read" in output
    monkeypatch.chdir(here)
    assert "resumed from" in run(train_rm.main, "--resume", "elsewhere/rm", "--epochs", 2)
    moved = here.parent / f"{here.name}-moved"
    shutil.copytree(here, moved)
    shutil.rmtree(here / "data")
    monkeypatch.chdir(moved)
    run(
        train_ppo.main,
        "--policy",
        "runs/sft",
        "--reward",
        "gold",
        "--steps",
        1,
        "--rollout_prompts",
        4,
        "--output_dir",
        "ppo",
        *ANSWER,
    )
    assert read_metrics("ppo", "judge/score")


def test_a_path_that_is_gone_says_where_it_came_from(here, capsys):
    os.remove("data/train.jsonl")
    message = refused(capsys, train_rm.main, "--policy", "runs/sft", *RM)
    assert "error: data/train.jsonl: no such file (from runs/sft/rllr.json)" in message


def test_paths_for_and_from_a_record(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jsonl").touch()
    assert (
        path_for_record("a/x.jsonl", "runs/sft") == "../../a/x.jsonl"
        and path_for_record("a/x.jsonl", "a") == "./x.jsonl"
    )
    assert (
        path_from_record("../../a/x.jsonl", "runs/sft")
        == os.path.join("a", "x.jsonl")
        == path_from_record("./x.jsonl", "a")
    )
    absolute = str(tmp_path / "a" / "x.jsonl")
    for value in (None, "", absolute, "organisation/model", "no/such/file"):
        assert path_for_record(value, "runs/sft") == value == path_from_record(value, "runs/sft")


def test_a_run_that_goes_on_by_an_absolute_path_keeps_relative_ones(here, capsys):
    """So it can still be moved, and its audit trail is one run's."""
    flags = ["--policy", "runs/sft", "--reward", "gold", "--prompts", "labelled", "--rollout_prompts", 4, *ANSWER]
    run(train_ppo.main, *flags, "--steps", 1, "--save_every", 1, "--audit", "all", "--output_dir", "runs/ppo")
    before = json.loads((here / "runs" / "ppo" / "run.json").read_text())["config"]
    run(train_ppo.main, "--resume", here / "runs" / "ppo", "--steps", 2)
    after = json.loads((here / "runs" / "ppo" / "run.json").read_text())["config"]
    assert after["policy"] == before["policy"] == "../sft" and after["train_file"] == "../../data/train.jsonl"
    with pytest.raises(SystemExit) as ended:
        audit.main(["replay", "runs/ppo"])
    assert ended.value.code == 0, capsys.readouterr()


def test_an_unfinished_run_is_no_policy(here, capsys):
    """Before its first look at dev it has saved none: not another task's data, but a word about it."""
    (here / "runs" / "half").mkdir()
    shutil.copy(here / "runs" / "sft" / "run.json", here / "runs" / "half")
    for main, flag in ((train_rm.main, "--policy"), (evaluate.main, "--models"), (train_sft.main, "--model")):
        message = refused(capsys, main, flag, "runs/half")
        assert "runs/half: this run has saved no model yet; let it run, or go on with train_sft.py --resume" in message


def test_a_model_without_a_record_names_no_task(here, toy, capsys):
    shutil.copytree(toy.base, "foreign", ignore=shutil.ignore_patterns("rllr.json"))
    message = refused(capsys, train_rm.main, "--policy", "foreign")
    assert "no run of train_sft.py made it, so nothing says what it is asked; give --task" in message


def test_column_names_of_the_record_are_told_of(here, capsys):
    """The user of this command has typed none."""
    path = here / "runs" / "sft" / "rllr.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"data": record["data"] | {"columns": "text=satz"}}))
    message = refused(capsys, evaluate.main, "--models", "runs/sft", "--test_file", "data/dev.jsonl")
    assert "no column 'satz' (--columns text=satz)" in message
    assert "--columns text=satz is from runs/sft/rllr.json; give this file's own" in message


# ---- few rows without a label ----------------------------------------------------------------------------------------


def test_a_gap_or_two_in_the_labels_is_no_pool_of_prompts(tmp_path):
    """One row in 60 has no label: PPO answers it and those that trained SFT. Of 4 in 40 it answers these alone."""
    for labelled, bare, few in ((59, 1, True), (40, 3, True), (40, 4, False), (40, 0, False)):
        splits = Splits(ROWS[:1] * labelled, [], ROWS[1:2] * bare, [])
        assert bool(splits.unlabelled and splits.few_unlabelled) is few
        assert len(splits.prompts()) == (labelled + bare if few or not bare else bare)
        assert len(splits.prompts("labelled")) == labelled
        assert (
            "as they are few, so are the labelled ones" in told(*[ROWS[:1] * labelled, [], ROWS[1:2] * bare])[0]
        ) is few


# ---- formats ---------------------------------------------------------------------------------------------------------


def test_an_older_record_or_run_is_refused_in_one_sentence(here, capsys):
    run(train_sft.main, "--resume", "runs/sft", "--epochs", 2)
    for path, edit, own in (("runs/sft/rllr.json", "rllr", 2), ("runs/sft/run.json", "run", 5)):
        content = json.loads((here / path).read_text())
        (here / path).write_text(json.dumps({key: value for key, value in content.items() if key != "format"}))
        flags = ["--policy", "runs/sft", *RM] if edit == "rllr" else ["--resume", "runs/sft"]
        shutil.rmtree("runs/sft/checkpoints", ignore_errors=True)
        message = refused(capsys, train_rm.main if edit == "rllr" else train_sft.main, *flags)
        assert (
            f"{path}: has format 1, this version of rllr has format {own}, and what a run computes has changed "
            "in between (CHANGELOG.md); " in message
        )
        (here / path).write_text(json.dumps(content))


# ---- what the log says -----------------------------------------------------------------------------------------------


def told(labelled, held_out=(), unlabelled=(), evaluation=(), test=()):
    log = []
    tell_splits(Splits(*map(list, (labelled, held_out, unlabelled, evaluation, test))), TASK, log.append)
    return log


def about_texts(*splits, **more):
    return [line for line in told(*splits, **more) if "as well" in line]


def test_rows_per_split_and_class():
    unlabelled = [Example(f"u{i}", f"more {i}") for i in range(2)]
    assert told(ROWS[:20], ROWS[20:25], unlabelled, ROWS[30:34], ROWS[34:37])[0].splitlines() == [
        "rows: 20 labelled to train on (good 10, bad 10): SFT and the reward models learn from them",
        "      5 labelled held out (good 2, bad 3): they stop the reward model",
        "      2 unlabelled: PPO's prompts",
        "      4 for evaluation (dev) (good 2, bad 2): they choose epoch and step; preview, guard",
        "      3 for test (good 1, bad 2): they choose nothing: report figures of these",
    ]
    few, many = ([Example(f"d{i}", f"dev {i}", label="good") for i in range(count)] for count in (399, 400))
    assert told(ROWS[:20], evaluation=few)[1] == (
        "warning: dev has 399 rows: preview, guard and the choice of epoch and step are shaky; 400 or more would make "
        "them surer"
    )
    assert not any("shaky" in line for line in told(ROWS[:20], evaluation=many))


def test_texts_in_two_splits():
    """Compared without case and white space, across ids and labels."""
    again = [Example("x", " TEXT  3", label="good"), Example("y", "new", label="bad")]
    (line,) = about_texts(ROWS[:20], ROWS[20:25], evaluation=again)
    assert line.startswith(
        "warning: 1 of 2 evaluation texts are among the training rows as well (x): what is measured on them"
    )
    (line,) = about_texts(ROWS[:20], again, evaluation=ROWS[30:34])
    assert line.startswith("warning: 1 of 2 held-out texts are among the rows to train on as well (x)")
    for place in range(4):  # a test text is in none of the others
        splits = [ROWS[:10], ROWS[10:20], ROWS[20:25], ROWS[30:34]]
        splits[place] = [*splits[place], replace(again[0], text="the test's own")]
        (line,) = about_texts(*splits, test=[Example("t", "The test's OWN", label="good"), again[1]])
        assert line.startswith("warning: 1 of 2 test texts are among the training and evaluation rows as well (t)")
    assert not about_texts(ROWS[:20], ROWS[20:25], evaluation=ROWS[30:34], test=ROWS[34:])


def test_one_class_and_a_class_without_a_row():
    good = [row for row in ROWS if row.label == "good"]
    log = told(good, evaluation=good[:3])
    assert any(line.startswith("warning: all 20 rows to train on are labelled 'good'") for line in log)
    assert any(line.startswith("warning: all 3 evaluation rows are labelled 'good'") for line in log)
    assert any(line.startswith("warning: no row to train on is labelled 'bad'") for line in log)


def test_the_evaluation_file_is_the_training_file(tmp_path):
    path, log = write_rows(tmp_path / "rows.jsonl", TRAIN_ROWS), []
    load_splits(DataConfig(train_file=path, eval_file=path), TASK, log.append)
    assert any(
        f"{len(TRAIN_ROWS)} of {len(TRAIN_ROWS)} evaluation texts are among the training rows" in line for line in log
    )


def test_no_row_has_a_label(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": row["text"], "label": -1} for row in TRAIN_ROWS])
    with pytest.raises(InputError, match=f"^--train_file {path}: no row has a label; name their column"):
        load_splits(DataConfig(train_file=path), TASK, print)


def test_a_data_set_without_a_validation_split(tmp_path):
    from datasets import Dataset

    Dataset.from_list([{"text": row["text"], "label": row["label"]} for row in TRAIN_ROWS]).save_to_disk(
        tmp_path / "saved"
    )
    log = []
    splits = load_splits(DataConfig(dataset=str(tmp_path / "saved")), TASK, log.append)
    assert len(splits.eval) == 5 and any("evaluation rows are set aside from the training rows" in line for line in log)
    with pytest.raises(InputError, match="without splits, so there is no 'validation'"):
        load_splits(DataConfig(dataset=str(tmp_path / "saved"), eval_split="validation"), TASK, print)


def test_a_digest_of_rows_is_of_what_they_say():
    assert (
        rows_digest(ROWS)
        == rows_digest(ROWS[::-1])
        == rows_digest([Example(r.id, r.text, label=r.label, place="elsewhere") for r in ROWS])
    )
    other = [*ROWS[:-1], Example(ROWS[-1].id, ROWS[-1].text, label="bad")]
    assert rows_digest(ROWS) != rows_digest(ROWS[:-1]) != rows_digest(other) and rows_digest(other) != rows_digest(ROWS)
