"""TensorBoard and Weights & Biases get what metrics.jsonl gets, from the real libraries, and never end a run."""

import json
import shutil
import time

import pytest
from stopping import Killed, assert_same_run, kill_at, refused, stage_of
from toy_runs import read_lines, run

import rllr.update
from rllr.common.log import MetricsLog
from rllr.run import trackers
from rllr.run.trackers import Trackers


def numbers_of(directory):
    """{(name, step): the last value} of metrics.jsonl, which is what a tracker must show."""
    found = {}
    for line in read_lines(directory / "metrics.jsonl"):
        step = line.pop("step")
        found |= {(name, step): value for name, value in line.items() if value is not None}
    return found


def tensorboard_of(directory):
    """The same of the event files, read by TensorBoard's own reader."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard")
    events = accumulator.EventAccumulator(str(directory / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {(name, e.step): e.value for name in events.Tags()["scalars"] for e in events.Scalars(name)}


def records_in(path):
    """The records of an offline run's file: LevelDB's log format behind a header of seven bytes."""
    content, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768  # of this block
        if left < 7:  # too little for the head of a record
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last piece
            yield whole
            whole = b""


def ended(path, kind):
    """The records of a run, once its last one is there: W&B's own process writes them, and may be behind."""
    for _ in range(300):
        records = []
        for content in records_in(path):
            records.append(kind())
            records[-1].ParseFromString(content)
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            break
        time.sleep(0.1)
    return records


def wandb_of(directory):
    """The same of the offline runs; a later line of a step replaces an earlier one. And the ids of these runs."""
    from wandb.proto import wandb_internal_pb2

    found, ids = {}, set()
    for path in sorted(directory.glob("wandb/offline-run-*/*.wandb")):
        for record in ended(path, wandb_internal_pb2.Record):
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            if record.WhichOneof("record_type") == "history":
                items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                step = items.pop("step")
                found |= {(name, step): value for name, value in items.items() if not name.startswith("_")}
    return found, ids


@pytest.fixture
def offline(monkeypatch):
    pytest.importorskip("wandb", reason="no wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def same(ours, theirs):
    """Equal to float32, in which TensorBoard keeps its numbers."""
    assert ours.keys() == theirs.keys()
    assert not [key for key, value in ours.items() if theirs[key] != pytest.approx(value, rel=1e-6, abs=1e-9)]


@pytest.mark.parametrize("name", ["sft/full", "rm/full", "ppo/gold"])
def test_tensorboard_has_the_numbers(toy, tmp_path, name):
    pytest.importorskip("tensorboard", reason="no tensorboard")
    main, flags = stage_of(toy, name, tmp_path / "run")
    run(main, *flags, "--tensorboard")
    ours = numbers_of(tmp_path / "run")
    assert len(ours) > 20
    same(ours, tensorboard_of(tmp_path / "run"))


def test_the_names_are_grouped_by_the_acts(toy, tmp_path):
    pytest.importorskip("tensorboard", reason="no tensorboard")
    main, flags = stage_of(toy, "ppo/gold", tmp_path / "run")
    run(main, *flags, "--tensorboard")
    groups = {name.partition("/")[0] for name, _ in tensorboard_of(tmp_path / "run")}
    assert groups == {"act", "analyse", "judge", "shape", "credit", "improve", "eval", "time", "episodes", "seconds"}


@pytest.mark.slow
def test_wandb_offline_has_the_numbers(toy, tmp_path, offline):
    main, flags = stage_of(toy, "ppo/gold", tmp_path / "run")
    run(main, *flags, "--wandb", "a-project")
    found, ids = wandb_of(tmp_path / "run")
    same(numbers_of(tmp_path / "run"), found)
    assert ids == {(tmp_path / "run" / "wandb-id.txt").read_text()}


@pytest.mark.slow
def test_a_killed_run_goes_on_in_both(toy, undisturbed, tmp_path, monkeypatch, offline):
    """The same weights and metrics as a run without trackers, and what they show is the run that went on."""
    pytest.importorskip("tensorboard", reason="no tensorboard")
    main, flags = stage_of(toy, "ppo/gold", tmp_path / "run")
    with monkeypatch.context() as patch:
        kill_at(patch, rllr.update, "_losses", 28)
        with pytest.raises(Killed):
            run(main, *flags, "--tensorboard", "--wandb")
    run(main, *flags, "--resume", "--tensorboard", "--wandb")
    shutil.copytree(tmp_path / "run", tmp_path / "copy", symlinks=True)
    for path in (tmp_path / "copy").rglob("rllr.json"):  # the settings differ by the trackers alone
        record = json.loads(path.read_text())
        record["config"] |= {"tensorboard": False, "wandb": None}
        path.write_text(json.dumps(record))
    assert_same_run(undisturbed("ppo/gold"), tmp_path / "copy")
    ours = numbers_of(tmp_path / "run")
    same(ours, tensorboard_of(tmp_path / "run"))
    found, ids = wandb_of(tmp_path / "run")
    same(ours, found)
    assert len(ids) == 1


# ---- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_library_that_is_not_there_is_named(toy, tmp_path, monkeypatch, capsys, name):
    import sys

    monkeypatch.setitem(sys.modules, name, None)
    error = refused(capsys, "sft", *toy.data, "--model", toy.base, "--output_dir", tmp_path / "run", f"--{name}")
    assert f'--{name} needs {name}: pip install ".[{name}]"' in error and not (tmp_path / "run").exists()


def test_a_tracker_that_fails_is_told_of_once_and_dropped(capsys):
    written = []

    class Good:
        name = "good"

        def write(self, step, numbers):
            written.append((step, numbers))

        def close(self):
            written.append("closed")

    class Bad(Good):
        name = "bad"

        def write(self, step, numbers):
            raise OSError("the disk is full")

    both = Trackers([Bad(), Good()])
    for step in (1, 2):
        both.write({"step": step, "loss": 0.5, "nothing": None, "words": "no number"})
    both.close()
    assert written == [(1, {"loss": 0.5}), (2, {"loss": 0.5}), "closed"]
    assert capsys.readouterr().out.count("warning: --bad: OSError: the disk is full; it gets no more") == 1


@pytest.mark.parametrize("refusal", [ValueError("No API key configured."), RuntimeError(""), TimeoutError("slow")])
def test_wandb_that_cannot_be_opened_ends_no_run(toy, tmp_path, monkeypatch, refusal):
    """Whatever it raises: by then --overwrite has made room for this run, which must not be lost as well."""
    wandb = pytest.importorskip("wandb", reason="no wandb")

    def refuse(**given):
        assert 0 < given["settings"].finish_timeout <= 60  # W&B's own is without end
        raise refusal

    monkeypatch.setattr(wandb, "init", refuse)
    told = toy.ppo(tmp_path / "run", "--reward", "gold", "--wandb", steps=2)
    assert f"warning: --wandb: {type(refusal).__name__}" in told and "WANDB_MODE=offline" in told
    assert (tmp_path / "run" / "last").is_dir()


def test_the_metrics_are_whole_before_a_tracker_is_closed(tmp_path):
    """It may wait for a network until somebody kills the run."""

    class Slow:
        name = "slow"

        def write(self, step, numbers):
            pass

        def close(self):
            assert log.file.closed

    log = MetricsLog(tmp_path)
    log.trackers = Slow()
    log.close()
    assert log.file.closed


def test_no_tracker_by_default(toy, tmp_path):
    toy.ppo(tmp_path / "run", "--reward", "gold")
    assert not (tmp_path / "run" / trackers.FOLDER).exists() and not (tmp_path / "run" / trackers.WANDB_ID).exists()
