"""Test rows: read, or set aside by id; they are in no other split, and later stages take them over."""

import hashlib
import json
import random
from dataclasses import asdict

import pytest
from toy_runs import write_rows

from rllr.common.errors import InputError
from rllr.data import splits as splits_module
from rllr.data.inherited import inherit
from rllr.data.met_rows import joined_hashes, met_rows
from rllr.data.splits import DataConfig, Splits, load_evaluation, load_splits
from rllr.run.resume import Resumed
from rllr.tasks import TASKS, Example, Task

TASK = Task("toy", ("good", "bad"), "{text}")
ALL = ("labelled", "held_out", "unlabelled", "eval", "test")


def rows(count, start=0, **more):
    """Three good ones to each bad one."""
    numbers = range(start, start + count)
    return [{"text": f"text {i}", "id": f"r{i}", "label": "good" if i % 4 else "bad"} | more for i in numbers]


def loaded(record=None, log=None, given=(), policy=None, **settings):
    config = DataConfig(**settings)
    config.given, config.policy = frozenset(given), policy
    return load_splits(config, TASK, (log if log is not None else []).append, record)


def ids(part):
    return {row.id for row in part}


def hashed(texts):
    return [hashlib.sha256(json.dumps([text, ""]).encode()).hexdigest()[:16] for text in texts]


@pytest.fixture
def train(tmp_path):
    return write_rows(tmp_path / "train.jsonl", rows(600))


@pytest.fixture
def dev(tmp_path):
    return write_rows(tmp_path / "dev.jsonl", rows(40, 9000))


# ---- set aside


def test_a_tenth_is_set_aside_by_class(train, dev):
    log = []
    splits = loaded(train_file=train, eval_file=dev, log=log)
    assert [len(getattr(splits, name)) for name in ALL] == [486, 54, 0, 40, 60]
    assert sum(row.label == "bad" for row in splits.test) == 15
    assert "no test data given: 60 of the labelled rows are set aside for it" in log
    everywhere = [row.id for name in ALL for row in getattr(splits, name)]
    assert len(everywhere) == len(set(everywhere)) == 640


def test_the_same_test_rows_whatever_else_is_set_aside(train, dev, tmp_path):
    """With and without dev data, with other seeds and counts, in another order: a test row is one by its id."""
    test = ids(loaded(train_file=train, eval_file=dev).test)
    shuffled = random.Random(0).sample(rows(600), 600)
    elsewhere = write_rows(tmp_path / "shuffled.jsonl", shuffled)
    for settings in (
        {"train_file": train},
        {"train_file": train, "data_seed": 7, "labelled": 200},
        {"train_file": elsewhere, "eval_file": dev, "held_out": 0.3},
    ):
        splits = loaded(**settings)
        assert ids(splits.test) == test
        assert not test & set().union(*(ids(getattr(splits, name)) for name in ALL[:-1]))
    both = loaded(train_file=train)
    assert [len(getattr(both, name)) for name in ALL] == [432, 48, 0, 60, 60]
    assert loaded(train_file=train, data_seed=1).eval != both.eval  # dev and held-out rows do hang on the seed


def test_few_rows_set_none_aside_unless_asked_to(tmp_path):
    log = []
    few = write_rows(tmp_path / "few.jsonl", rows(494))
    assert loaded(train_file=few, log=log).test == []
    assert (
        "no test data given: 0.1 of the 494 labelled rows is 49, fewer than 50, so none are set aside; give "
        "--test_file, or --test_share to set some aside"
    ) in log
    assert len(loaded(train_file=few, test_share=0.1).test) == 49
    assert len(loaded(train_file=write_rows(tmp_path / "more.jsonl", rows(500))).test) == 50
    tiny = write_rows(tmp_path / "tiny.jsonl", rows(20))
    assert len(loaded(train_file=tiny, test_share=0.2).test) == 4


def test_a_share_of_nothing(train, dev):
    log = []
    splits = loaded(train_file=train, eval_file=dev, test_share=0.0, log=log)
    assert splits.test == [] and len(splits.labelled + splits.held_out) == 600
    assert not any("test data" in line for line in log) and "test" not in splits.digests()


def test_only_rows_with_a_label_are_set_aside(tmp_path, dev):
    """A tenth of the 500 that have one; the others stay prompts."""
    path = write_rows(tmp_path / "mixed.jsonl", rows(500) + rows(300, 500, label=None))
    splits = loaded(train_file=path, eval_file=dev)
    assert len(splits.test) == 50 and ids(splits.unlabelled) == {f"r{i}" for i in range(500, 800)}


def test_more_labels_than_are_left(train, dev):
    message = r"--labelled 541: there are 540 training rows with a label \(and 60 set aside\); give 1 to 540"
    with pytest.raises(InputError, match=message):
        loaded(train_file=train, eval_file=dev, labelled=541)
    assert len(loaded(train_file=train, eval_file=dev, labelled=540).unlabelled) == 0


# ---- read


def test_a_test_file_is_read_and_nothing_set_aside(train, dev, tmp_path):
    """Rows of the training file stay there, though they have the ids of test rows; equal texts are told of."""
    log = []
    test = write_rows(tmp_path / "test.jsonl", [*rows(30, 5000), *rows(2, 0), *rows(1, 9000)])
    splits = loaded(train_file=train, eval_file=dev, test_file=test, log=log)
    assert [len(getattr(splits, name)) for name in ALL] == [540, 60, 0, 40, 33]
    assert any(
        "warning: 3 of 33 test texts are among the training and evaluation rows as well (" in line for line in log
    )
    found = splits.digests(), splits.fingerprints(), splits.text_hashes()
    assert found[1].keys() == {"--train_file", "--eval_file", "--test_file"} and len(found[2]["test"]) == 33
    write_rows(tmp_path / "test.jsonl", rows(33, 5000))
    other = loaded(train_file=train, eval_file=dev, test_file=test)
    changed = [{k for k in a if a[k] != b[k]} for a, b in zip(found, (other.digests(), other.fingerprints()))]
    assert changed == [{"read for test", "test"}, {"--test_file"}]


def test_test_rows_need_a_label(train, dev, tmp_path):
    test = write_rows(tmp_path / "test.jsonl", rows(5, 5000) + rows(5, 6000, label=None))
    assert len(loaded(train_file=train, eval_file=dev, test_file=test).test) == 5


def test_the_test_split_of_a_data_set_is_read_where_it_is_named(tmp_path):
    from datasets import Dataset, DatasetDict

    parts = {"train": rows(600), "validation": rows(40, 9000), "test": rows(30, 5000)}
    DatasetDict({name: Dataset.from_list(part) for name, part in parts.items()}).save_to_disk(tmp_path / "saved")
    saved = {"dataset": str(tmp_path / "saved")}
    assert len(loaded(**saved).test) == 60
    assert ids(loaded(**saved, test_split="test").test) == {f"r{i}" for i in range(5000, 5030)}
    with pytest.raises(InputError, match="has no split 'tests'"):
        loaded(**saved, test_split="tests")


def test_the_demo_has_its_own():
    test = load_evaluation(DataConfig(), TASKS["demo"], "test")
    assert len(test) == 2000 and all(row.id.startswith("demo-test-") for row in test)


# ---- in later stages


def test_a_later_stage_reads_the_test_rows_of_the_record(tmp_path, monkeypatch):
    """The path is as seen from the record; a share that is given anew is told of."""
    (tmp_path / "runs").mkdir()
    write_rows(tmp_path / "test.jsonl", rows(5, 5000))
    monkeypatch.chdir(tmp_path)
    config = DataConfig()
    record = {"data": asdict(DataConfig(train_file="a.jsonl", test_file="../test.jsonl"))}
    assert inherit(config, record, "runs") == [] and config.test_file == "test.jsonl"
    config = DataConfig(test_share=0.2)
    assert inherit(config, {"data": asdict(DataConfig(test_share=0.1))}, "runs") == [
        "--test_share 0.2 (the policy was trained with 0.1)"
    ]


def test_a_policy_without_test_rows_gets_none_from_its_training_rows(train, dev):
    """They would have trained it. A tiny model has met no label, and other training rows are new to the policy."""
    settings = {"train_file": train, "eval_file": dev}
    found, older = loaded(**settings).digests(), loaded(**settings, test_share=0).digests()
    assert loaded({"stage": "sft", "rows": older}, **settings).test == []
    assert len(loaded({"stage": "sft", "rows": found}, **settings).test) == 60
    assert len(loaded({"stage": "tiny", "rows": older}, **settings).test) == 60
    with pytest.raises(InputError, match="its labelled, held_out, test rows are others than this version"):
        loaded({"stage": "sft", "rows": older}, **settings, test_share=0.1)
    other = older | {"read for train": "0" * 64}
    assert len(loaded({"stage": "sft", "rows": other}, **settings, given=["train_file"]).test) == 60


def test_other_rows_keep_to_what_they_are_new_for(train, dev, tmp_path):
    """r0 .. r9 trained the policy, r10 .. r14 chose it, r15 .. r17 are its test rows, r20 were prompts of PPO's."""
    policy = tmp_path / "policy"
    policy.mkdir()
    known = {
        "labelled": range(10),
        "held_out": range(10, 12),
        "eval": range(12, 15),
        "test": range(15, 18),
        "prompts": [20],
    }
    known = {name: hashed(f"text {i}" for i in numbers) for name, numbers in known.items()}
    (policy / "rows.json").write_text(json.dumps(known))
    record = {"stage": "sft", "rows": {f"read for {part}": "0" * 64 for part in ("train", "eval", "test")}}
    test = write_rows(tmp_path / "test.jsonl", rows(30))
    settings = {"train_file": train, "eval_file": write_rows(tmp_path / "dev2.jsonl", rows(30)), "test_file": test}
    log = []
    splits = loaded(record, log, ["test_file"], policy, **settings)
    assert ids(splits.labelled + splits.held_out) == {f"r{i}" for i in range(18, 600)}
    assert ids(splits.eval) == {f"r{i}" for i in (*range(10, 15), *range(18, 30))}
    assert ids(splits.test) == {f"r{i}" for i in range(15, 30)}
    assert f"--test_file {test}: 15 of 30 rows trained or chose the policy and are left out" in log
    # where the policy's record names no rows of that kind, they are as new, without a word of a change
    del record["rows"]["read for test"]
    log = []
    assert ids(loaded(record, log, ["test_file"], policy, **settings).test) == {f"r{i}" for i in range(15, 30)}
    assert sum("other rows than those" in line for line in log) == 2
    with pytest.raises(InputError, match="its rows are other ones now"):
        loaded(record | {"rows": {"read for test": "0" * 64}}, policy=policy, **settings)
    met = met_rows([policy], [Example(str(i), f"text {i}") for i in range(25)])
    assert met == {"rows_that_trained": 11, "rows_that_chose": 5}
    nothing = {"rows_that_trained": 0, "rows_that_chose": 0}
    assert met_rows(["organisation/model"], [Example("0", "text 0")]) == nothing


# ---- an SFT that goes on, and the stages after it


def kept_by(tmp_path, name, splits):
    """(record, directory) of a policy that was trained on these rows."""
    directory = tmp_path / name
    directory.mkdir()
    (directory / "rows.json").write_text(json.dumps(splits.text_hashes()))
    return {"stage": "sft", "rows": splits.digests()}, directory


def going_on(record, log, directory, given=("train_file",), **settings):
    """The splits of an SFT that starts from the policy in `directory`."""
    config = DataConfig(**settings)
    config.given, config.model, config.START = frozenset(given), str(directory), "model"
    return load_splits(config, TASK, log.append, record)


def parts_of(splits):
    return {name: ids(getattr(splits, name)) for name in ALL}


@pytest.mark.parametrize("data_seed", [0, 1, 2])
@pytest.mark.parametrize("labelled", [None, 700])
def test_a_row_keeps_to_its_part_where_sft_goes_on(tmp_path, data_seed, labelled):
    """600 known rows among 900: what trained the first policy evaluates no later one, and what evaluated it trains
    none. The stages after the second SFT draw the rows that it drew."""
    first_file = write_rows(tmp_path / "first.jsonl", rows(600))
    more = write_rows(tmp_path / "more.jsonl", rows(900))
    first = loaded(train_file=first_file, data_seed=data_seed)
    record, directory = kept_by(tmp_path, "first", first)
    log, settings = [], {"train_file": more, "data_seed": data_seed, "labelled": labelled}
    second = going_on(record, log, directory, **settings)
    before, now = parts_of(first), parts_of(second)
    assert before["test"] < now["test"] and before["eval"] < now["eval"]
    assert len(now["test"]) == 60 + 30 and len(now["eval"]) == 60 + 30
    for name in ("held_out", "eval", "test"):
        assert not now[name] & before["labelled"]
    assert not before["held_out"] & now["labelled"]
    if not labelled:
        assert before["held_out"] < now["held_out"] and len(now["held_out"]) == 48 + 24
    said = f"of the texts that {directory} has met, 432 stay to train on, 48 stay held out, 60 stay dev, 60 stay test"
    assert any(said in line for line in log)
    record, directory = kept_by(tmp_path, "second", second)
    third = loaded(record, [], policy=directory, **settings)
    assert parts_of(third) == now and third.digests() == second.digests()
    assert going_on(record, [], directory, (), **settings).digests() == second.digests()  # on the same rows once more


def test_what_was_left_out_stays_so_in_the_next_stage(tmp_path, dev):
    """A second round on other rows, and the stages after it: the policy's record names these rows, and not which of
    them an earlier one had met."""
    first = loaded(train_file=write_rows(tmp_path / "first.jsonl", rows(300)), eval_file=dev)
    record, directory = kept_by(tmp_path, "first", first)
    known = first.text_hashes()
    more, dev2 = (
        write_rows(tmp_path / name, rows(n, a)) for name, n, a in (("more.jsonl", 700, 100), ("dev2.jsonl", 400, 8700))
    )
    settings, log = {"train_file": more, "eval_file": dev2}, []
    second = loaded(record, log, list(settings), directory, **settings)
    assert ids(second.labelled) | ids(second.held_out) | ids(second.test) == {f"r{i}" for i in range(300, 800)}
    record, _ = kept_by(tmp_path, "second", second)
    joined = joined_hashes(known, second.text_hashes())
    (tmp_path / "second" / "rows.json").write_text(json.dumps(joined))
    third = loaded(record, log, policy=tmp_path / "second", **settings)
    assert parts_of(third) == parts_of(second)
    config = DataConfig(**settings)
    config.policy = tmp_path / "second"
    for part in ("eval", "test"):
        assert ids(load_evaluation(config, TASK, part, record=record)) == parts_of(second)[part]


def test_test_rows_of_the_start_train_nothing_though_they_lost_their_label(tmp_path, dev):
    first = loaded(train_file=write_rows(tmp_path / "first.jsonl", rows(600)), eval_file=dev)
    record, directory = kept_by(tmp_path, "first", first)
    bare = [row | {"label": None} if row["id"] in ids(first.test) else row for row in rows(600)]
    log, more = [], write_rows(tmp_path / "more.jsonl", bare + rows(100, 700))
    splits = going_on(record, log, directory, train_file=more, eval_file=dev)
    assert not ids(first.test) & ids(splits.unlabelled) and not splits.unlabelled
    assert (
        f"--train_file {more}: 60 of 700 rows are test rows of the model that SFT starts from and are left out" in log
    )


def test_what_a_row_was_first_counts_where_it_was_several_things(tmp_path, dev):
    """r0 .. r9 trained, r5 .. r14 were dev rows, r10 .. r19 test rows: with test data of its own the last are left out.
    On the very rows of before, too, since more of their labels are used now."""
    train, test = write_rows(tmp_path / "train.jsonl", rows(600)), write_rows(tmp_path / "test.jsonl", rows(60, 7000))
    directory = tmp_path / "first"
    directory.mkdir()
    known = {"labelled": range(10), "eval": range(5, 15), "test": range(10, 20)}
    known = {name: hashed(f"text {i}" for i in numbers) for name, numbers in known.items()}
    (directory / "rows.json").write_text(json.dumps(known))
    record = {"stage": "sft", "rows": loaded(train_file=train, eval_file=dev, labelled=100).digests()}
    splits = going_on(record, [], directory, train_file=train)
    numbers = {name: {int(row.id[1:]) for row in getattr(splits, name)} & set(range(20)) for name in ALL}
    assert numbers["eval"] == set(range(10, 15)) and numbers["test"] == set(range(15, 20))
    assert numbers["labelled"] == set(range(10)) and not numbers["held_out"]
    settings = {"train_file": train, "eval_file": dev, "test_file": test}
    splits = going_on(record, [], directory, tuple(settings), **settings)
    numbers = {name: {int(row.id[1:]) for row in getattr(splits, name)} & set(range(20)) for name in ALL}
    assert numbers["labelled"] == set(range(15)) and set().union(*numbers.values()) == set(range(15))


def test_nothing_new_to_set_aside(tmp_path):
    """Dev rows must be given then; what is held out has trained, which is said."""
    first_file = write_rows(tmp_path / "first.jsonl", rows(600))
    first = loaded(train_file=first_file)
    record, directory = kept_by(tmp_path, "first", first)
    only = write_rows(tmp_path / "only.jsonl", [row for row in rows(600) if row["id"] in ids(first.labelled)])
    with pytest.raises(InputError, match="every labelled row trained the model that SFT starts from; .* --eval_file"):
        going_on(record, [], directory, train_file=only)
    log, dev = [], write_rows(tmp_path / "dev2.jsonl", rows(40, 9000))
    splits = going_on(record, log, directory, ("train_file", "eval_file"), train_file=only, eval_file=dev)
    assert len(splits.held_out) == 43 and any(line.startswith("warning: every labelled row trained") for line in log)


def test_a_data_set_by_flag_comes_before_the_files_of_the_record(tmp_path):
    record = {"data": asdict(DataConfig(train_file="a.jsonl", eval_file="b.jsonl", labelled=7))}
    for config, labelled in ((DataConfig(dataset="saved"), 7), (DataConfig(dataset="saved"), None)):
        config.given = frozenset({"dataset"})
        if labelled is None:
            config.START = "model"
        assert inherit(config, record, "runs") == []
        assert (config.train_file, config.eval_file, config.labelled) == (None, None, labelled)


def test_a_resumed_run_has_the_same_test_rows(train, dev, tmp_path):
    test = write_rows(tmp_path / "test.jsonl", rows(30, 5000))
    config = DataConfig(train_file=train, eval_file=dev, test_file=test)
    began = load_splits(config, TASK, print).fingerprints()
    load_splits(config, TASK, print, resumed=Resumed(tmp_path, None, {"reads": began}))
    write_rows(test, rows(29, 5000))
    for reads, then in (
        (began, began["--test_file"][:12]),
        ({k: v for k, v in began.items() if "test" not in k}, "None"),
    ):
        message = f"would be another run: --test_file {test} holds [0-9a-f]*, the run began with {then}"
        with pytest.raises(InputError, match=message):
            load_splits(config, TASK, print, resumed=Resumed(tmp_path, None, {"reads": reads}))


def test_hashes_are_joined_in_order_and_once():
    known, more = {"labelled": ["a"], "eval": ["c", "b"]}, {"eval": ["b", "d"], "prompts": ["e"]}
    assert joined_hashes(known, more) == {"labelled": ["a"], "eval": ["c", "b", "d"], "prompts": ["e"]}
    known |= {"left out of train": ["x"], "still test": ["y"]}  # of the earlier run's rows
    more |= {"still eval": ["z"]}
    assert joined_hashes(known, more) == joined_hashes({"labelled": ["a"], "eval": ["c", "b"]}, more)
    assert joined_hashes(known, more)["still eval"] == ["z"]


def test_a_part_that_the_record_does_not_name(train, dev):
    config = DataConfig(train_file=train, eval_file=dev)
    config.policy = None
    with pytest.raises(InputError, match="--part test: the policy's record names no test rows; give .* --test_file"):
        load_evaluation(config, TASK, "test", record={"rows": {"eval": "0"}})
    found = loaded(train_file=train, eval_file=dev)
    assert ids(load_evaluation(config, TASK, "test", record={"rows": found.digests()})) == ids(found.test)
    assert splits_module.FEWEST_TEST_ROWS == 50 and splits_module.TEST_SHARE == 0.1


# ---- PPO's prompts


def test_ppo_answers_the_unlabelled_rows_where_there_are_any_unless_it_is_told_to():
    few, many = ([Example(f"{name}{n}", f"text {n}") for n in range(3)] for name in "ab")
    both, one = Splits(few, [], many, []), Splits(few, [], [], [])
    assert both.prompts() == both.prompts("auto") == many and both.prompts("labelled") == few
    assert one.prompts() == one.prompts("labelled") == few
    gap = Splits(few * 11, [], many[:3], [])  # a gap or two among labels is no pool of prompts
    assert gap.prompts() == many[:3] + few * 11 and gap.prompts("labelled") == few * 11


# ---- rationales


def test_the_rationales_of_some_rows_alone(tmp_path, dev):
    """By class, those of the rows that --labelled would choose; the other labelled rows keep their label."""
    every = [row | {"rationale": f"as it is {row['label']}"} for row in rows(600)]
    settings = {
        "train_file": write_rows(tmp_path / "train.jsonl", every),
        "eval_file": dev,
        "test_share": 0,
        "data_seed": 3,
    }
    splits, fewer = loaded(**settings, labelled=200, rationale_rows=40), loaded(**settings, labelled=40)
    labelled = splits.labelled + splits.held_out
    explained = [row for row in labelled if row.rationale]
    assert len(labelled) == 200 and all(row.label for row in labelled)
    assert ids(explained) == ids(fewer.labelled + fewer.held_out) and sum(row.label == "bad" for row in explained) == 10
    assert all(row.rationale == f"as it is {row.label}" for row in explained)
    whole = loaded(**settings, labelled=200)
    assert ids(whole.labelled) == ids(splits.labelled) and all(row.rationale for row in whole.labelled)
    assert whole.digests()["labelled"] != splits.digests()["labelled"]
