"""Metrics and checkpoints on disk: what comes back, what is damaged, what is kept."""

import json
import math
from pathlib import Path

import pytest
import torch
from stopping import cut, flip

from rllr.common.errors import InputError
from rllr.common.files import new_directory
from rllr.common.log import MetricsLog
from rllr.run.checkpoint import (
    MANIFEST,
    STATE,
    TENSORS,
    join_tensors,
    list_checkpoints,
    problem_with,
    read_checkpoint,
    restore_names,
    split_tensors,
    write_checkpoint,
)  # fmt: skip

# ---- metrics


def strictly(line):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(line, parse_constant=refuse)


def test_metrics_are_valid_json_line_by_line(tmp_path, capsys):
    log = MetricsLog(tmp_path)
    log.write({"step": 1, "loss": torch.tensor(0.5), "bad": float("nan"), "worse": torch.tensor(math.inf), "n": None})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # there at once, not when the run ends
    row = strictly(lines[0])
    assert row.pop("seconds") >= 0
    assert row == {"step": 1, "loss": 0.5, "bad": None, "worse": None, "n": None}
    log.write({"step": torch.tensor(2), "minus": -math.inf, "seconds": 7, "name": "é"}, "a readable line")
    log.close()
    assert capsys.readouterr().out == "a readable line\n"
    MetricsLog(tmp_path).write({"step": 3})  # a log is continued
    rows = [strictly(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[1] == {"step": 2, "minus": None, "seconds": 7, "name": "é"} and rows[2]["step"] == 3


def test_metrics_go_on_where_the_checkpoint_was(tmp_path):
    log = MetricsLog(tmp_path)
    for step in (1, 2):
        log.write({"step": step})
    state = log.state_dict()
    log.write({"step": 3})
    log.file.write('{"step": 4, "lo')  # the line that was being written when the power went
    log.close()
    again = MetricsLog(tmp_path)
    again.load_state_dict(state)
    again.write({"step": 3})
    again.close()
    rows = [strictly(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[2]["seconds"] >= rows[1]["seconds"]


# ---- checkpoints on disk


def state(step=3):
    return {"step": step, "parts": {"model": {"w.a": torch.randn(4, 3)}, "rng": [3, (1, 2), None],
        "odd": {0: {"x": torch.tensor(1.5)}},
            "best": [0.1, -math.inf], "name": "é", "flag": True}}  # fmt: skip


def test_a_state_comes_back(tmp_path):
    wanted = state()
    write_checkpoint(tmp_path, 3, wanted, keep_last=2)
    found = read_checkpoint(tmp_path / "checkpoints" / "step-000003")
    parts = found["parts"]
    assert torch.equal(parts["model"]["w.a"], wanted["parts"]["model"]["w.a"]) and parts["odd"][0]["x"].item() == 1.5
    assert parts["rng"] == [3, [1, 2], None] and parts["best"] == [0.1, -math.inf]
    assert (parts["name"], parts["flag"], found["step"]) == ("é", True, 3)


def test_states_that_look_like_our_own_marks():
    for wanted in (
        {"__tensor__": "x"},
        {"__pairs__": [[1, 2]]},
        {"__tensor__": torch.ones(1)},
        {"pairs": 1},
        {1: 2},
        {},
        [],
    ):
        tensors = {}
        plain = json.loads(json.dumps(split_tensors(wanted, tensors)))
        assert str(join_tensors(plain, tensors)) == str(wanted)
    with pytest.raises(TypeError, match="a.0: a checkpoint cannot hold a set"):
        split_tensors({"a": [set()]}, {})


def test_the_last_ones_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path, step, state(step), keep_last=3)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000004", "step-000003", "step-000002"]
    write_checkpoint(
        tmp_path, 3, state(3), keep_last=3
    )  # gone on with from an earlier step: what came after is another run's
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000003", "step-000002"]


DAMAGE = {
    "a torn file": (TENSORS, cut, "bytes, and not what manifest.json says"),
    "a flipped bit in the tensors": (TENSORS, flip, "its SHA-256 differs"),
    "a flipped bit in the state": (STATE, flip, "its SHA-256 differs"),
    "a lost file": (STATE, Path.unlink, "No such file"),
    "a lost manifest": (MANIFEST, Path.unlink, "manifest.json: no such file"),
    "a torn manifest": (MANIFEST, cut, None),
    "an empty manifest": (MANIFEST, lambda path: path.write_text("{}"), "is not a manifest"),
    "another format": (MANIFEST, lambda path: path.write_text('{"format": 99, "files": {}}'), "reads format 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_seen(tmp_path, name):
    file, harm, words = DAMAGE[name]
    path = write_checkpoint(tmp_path, 3, state(), keep_last=2)
    assert problem_with(path) is None
    harm(path / file)
    if name == "a torn manifest":
        harm(path / file), harm(path / file)  # the last character is a line's end
        words = "not valid JSON"
    assert words in problem_with(path)
    with pytest.raises(InputError, match=f"^checkpoint {path}: "):
        read_checkpoint(path)


def test_a_checkpoint_that_was_moved_aside_gets_its_name_back(tmp_path):
    """Killed between the two renames that put a new checkpoint in the place of one of the same step."""
    path = write_checkpoint(tmp_path, 3, state(), keep_last=2)
    path.rename(path.with_name(".step-000003.old"))
    path.with_name(".step-000003.part").mkdir()
    assert list_checkpoints(tmp_path) == []
    restore_names(tmp_path)
    assert list_checkpoints(tmp_path) == [path] and problem_with(path) is None
    path.rename(path.with_name(".step-000003.old"))
    with (
        pytest.raises(KeyboardInterrupt),
        new_directory(path),
    ):  # and writing it again does not remove the only copy first
        raise KeyboardInterrupt
    restore_names(tmp_path)
    assert problem_with(path) is None


def test_half_a_line_before_the_checkpoints_place(tmp_path):
    log = MetricsLog(tmp_path)
    log.write({"step": 1}), log.write({"step": 2})
    saved = log.state_dict()
    log.close()
    cut(tmp_path / "metrics.jsonl"), cut(tmp_path / "metrics.jsonl")
    again = MetricsLog(tmp_path)
    again.load_state_dict(saved)
    again.write({"step": 3})
    assert [strictly(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 3]
