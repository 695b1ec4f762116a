"""Files that are whole or not there, and directories of runs."""

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch

import rllr.common.files
from rllr.common.errors import InputError, RunError
from rllr.common.files import (
    METRICS,
    RECORD,
    RUN,
    check_run_directory,
    disk_faults,
    new_directory,
    open_run_directory,
    read_json,
    read_safetensors,
    saving_into,
    sha256_of,
    write_json,
    write_safetensors,
)  # fmt: skip

# ---- run directories


def test_a_new_run_directory_is_made_with_its_parents(tmp_path):
    path = open_run_directory(str(tmp_path / "runs" / "task" / "sft"), overwrite=False)
    assert path == tmp_path / "runs" / "task" / "sft" and list(path.iterdir()) == []
    assert open_run_directory(path, overwrite=False) == path  # empty: nothing to lose


@pytest.mark.parametrize("ours", [RECORD, METRICS, RUN])
def test_a_run_is_replaced_only_with_overwrite(tmp_path, ours):
    (tmp_path / ours).write_text("{}")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "model.safetensors").write_text("weights")
    with pytest.raises(
        InputError, match=f"^--output_dir {tmp_path}: already holds a run; give another, --resume or --overwrite"
    ):
        open_run_directory(tmp_path, overwrite=False)
    assert (tmp_path / "sub" / "model.safetensors").exists()
    assert list(open_run_directory(tmp_path, overwrite=True).iterdir()) == []


def test_files_of_others_are_never_removed(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="already holds files; give another"):
        open_run_directory(tmp_path, overwrite=False)
    with pytest.raises(InputError, match="holds files that no run of rllr wrote; not overwriting them"):
        open_run_directory(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_in_the_way(tmp_path, overwrite):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(InputError, match=f"^--output_dir {tmp_path}/file: is a file"):
        open_run_directory(tmp_path / "file", overwrite)
    with pytest.raises(InputError, match=f"{tmp_path}/file/sft: cannot be written: {tmp_path}/file is no directory"):
        open_run_directory(tmp_path / "file" / "sft", overwrite)
    assert (tmp_path / "file").read_text() == "kept"


def test_checking_a_run_directory_touches_nothing(tmp_path):
    assert check_run_directory(str(tmp_path / "new"), overwrite=False) == tmp_path / "new"
    assert not (tmp_path / "new").exists()
    (tmp_path / "metrics.jsonl").write_text("{}")
    assert check_run_directory(tmp_path, overwrite=True) == tmp_path and (tmp_path / "metrics.jsonl").exists()
    with pytest.raises(InputError, match="already holds a run"):
        check_run_directory(tmp_path, overwrite=False)


@pytest.mark.parametrize("opened", [check_run_directory, open_run_directory])
def test_overwrite_never_removes_what_the_run_reads(tmp_path, opened):
    run, data = tmp_path / "run", tmp_path / "run" / "data" / "train.jsonl"
    data.parent.mkdir(parents=True)
    for file in (run / RECORD, data, tmp_path / "other.jsonl"):
        file.write_text("{}")
    for inside in (data, run, run / "data" / ".." / "data"):
        with pytest.raises(InputError, match=f"--overwrite would delete {inside}, which this run reads"):
            opened(run, True, inputs=[None, str(inside)])
    assert data.exists()
    opened(run, True, inputs=[None, "", str(tmp_path / "other.jsonl"), str(run / "none"), str(tmp_path), "org/model"])


def test_a_directory_that_may_not_be_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(rllr.common.files.os, "access", lambda path, mode: False)
    for path in (tmp_path, tmp_path / "a" / "b"):
        with pytest.raises(InputError, match=f"{path}: cannot be written: {tmp_path} is no directory that you"):
            check_run_directory(path, overwrite=False)


@pytest.mark.parametrize("denied", ["mkdir", "touch"])
def test_no_permission(tmp_path, monkeypatch, denied):
    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, denied, refuse)
    with pytest.raises(InputError, match=f"^--output_dir {tmp_path}/x: cannot be written: Permission denied"):
        open_run_directory(tmp_path / "x", overwrite=False)


# ---- files


def test_write_json_leaves_the_old_file_or_the_new_one(tmp_path):
    write_json(tmp_path / "a.json", {"é": [1.5, None]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"é": [1.5, None]}
    recursive = []
    recursive.append(recursive)
    with pytest.raises(ValueError):  # what cannot be written leaves the old file
        write_json(tmp_path / "a.json", recursive)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"é": [1.5, None]}
    write_json(tmp_path / "a.json", [])
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_tensors_come_back_and_damage_is_named(tmp_path):
    tensors = {"a.b": torch.randn(3, 4).t(), "n": torch.tensor(7.0), "bytes": torch.arange(5, dtype=torch.uint8)}
    write_safetensors(tensors, tmp_path / "x.safetensors")
    again = read_safetensors(tmp_path / "x.safetensors")
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)
    content = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(content[:-3])
    with pytest.raises(InputError, match=f"^{tmp_path}/x.safetensors: not a whole safetensors file"):
        read_safetensors(tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="no such file"):
        read_safetensors(tmp_path / "y.safetensors")
    assert sha256_of(tmp_path / "x.safetensors") == hashlib.sha256(content[:-3]).hexdigest()


@pytest.mark.parametrize(
    "content, words", [(b"{", "not valid JSON"), (b"\xff{}", "not valid JSON"), (b"[" * 100_000, "not valid JSON")]
)
def test_json_that_is_none(tmp_path, content, words):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match=f"^{tmp_path}/x.json: {words}"):
        read_json(tmp_path / "x.json")


def test_saving_into_moves_everything_or_nothing(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("old")
    (tmp_path / "model" / "notes").write_text("mine")
    with pytest.raises(ZeroDivisionError):
        with saving_into(tmp_path / "model") as temporary:
            (temporary / "weights").write_text("new")
            1 / 0
    assert (tmp_path / "model" / "weights").read_text() == "old"
    with saving_into(tmp_path / "model") as temporary:
        (temporary / "weights").write_text("new")
        (temporary / "templates").mkdir()
        (temporary / "templates" / "chat").write_text("c")
        assert (tmp_path / "model" / "weights").read_text() == "old"
    found = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert found == {"model/weights", "model/notes", "model/templates/chat"}
    assert (tmp_path / "model" / "weights").read_text() == "new"


def test_the_record_moves_last(tmp_path, monkeypatch):
    """A record that names weights which are not there yet would be a lie; the other way round it is refused as
    stale."""
    moved, plain = [], os.replace
    monkeypatch.setattr(rllr.common.files.os, "replace", lambda a, b: (moved.append(Path(b).name), plain(a, b)))
    with saving_into(tmp_path / "model") as temporary:
        for name in (RECORD, "zzz.safetensors", "config.json"):
            (temporary / name).write_text("{}")
    assert moved == ["config.json", "zzz.safetensors", RECORD]


def test_a_new_directory_is_whole_or_not_there(tmp_path):
    target = tmp_path / "runs" / "step-1"
    with pytest.raises(KeyboardInterrupt):
        with new_directory(target) as temporary:
            (temporary / "state").write_text("half")
            raise KeyboardInterrupt
    assert not target.exists() and list(target.parent.iterdir()) == []
    (target.parent / ".step-1.part").mkdir()  # what a killed process left
    (target.parent / ".step-1.part" / "rubbish").write_text("")
    for content in ("one", "two"):  # a directory of that name gives way
        with new_directory(target) as temporary:
            (temporary / "state").write_text(content)
        assert (target / "state").read_text() == content
    assert [p.name for p in target.parent.iterdir()] == ["step-1"] and [p.name for p in target.iterdir()] == ["state"]


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """fsync of the content, then the rename, then fsync of the directory that holds the name."""
    events, replace, rename = [], os.replace, os.rename
    monkeypatch.setattr(rllr.common.files, "force_to_disk", lambda path: events.append(("sync", Path(path).name)))
    monkeypatch.setattr(
        rllr.common.files.os, "replace", lambda a, b: (events.append(("name", Path(b).name)), replace(a, b))
    )
    monkeypatch.setattr(
        rllr.common.files.os, "rename", lambda a, b: (events.append(("name", Path(b).name)), rename(a, b))
    )
    write_json(tmp_path / "a.json", 1)
    assert events == [("sync", "a.json.part"), ("name", "a.json"), ("sync", tmp_path.name)]
    events.clear()
    with new_directory(tmp_path / "d") as temporary:
        (temporary / "f").write_text("")
    assert events == [("sync", "f"), ("sync", ".d.part"), ("name", "d"), ("sync", tmp_path.name)]


def test_what_the_disk_refuses_is_a_run_error_that_says_what_is_safe():
    with pytest.raises(
        RunError,
        match="^model x cannot be written: No space left on device. Make room and go on with --resume. Older: y.$",
    ):
        with disk_faults("model x", "Older: y."):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
