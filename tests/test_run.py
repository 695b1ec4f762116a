"""The life of a run: what --resume accepts and refuses, damage, signals, faults, a full disk, bounds while running."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import train_ppo
import train_rm
import train_sft
from safetensors.torch import load_file
from test_resume import Killed, assert_same_run, kill_at, stage_of
from toy_runs import ANSWER, read_metrics, run

import rllr.checkpoint
import rllr.files
import rllr.resume
import rllr.run
import rllr.update
from rllr.checkpoint import (
    MANIFEST, STATE, TENSORS, damage, join_tensors, list_checkpoints, mend, read_checkpoint, split_tensors, write_checkpoint,
)  # fmt: skip
from rllr.errors import InputError, RunError
from rllr.files import new_directory
from rllr.model import load_policy
from rllr.metrics import MetricsLog
from rllr.run import StopRequest

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
    return {"step": step, "parts": {"model": {"w.a": torch.randn(4, 3)}, "rng": [3, (1, 2), None], "odd": {0: {"x": torch.tensor(1.5)}},
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
    for wanted in ({"__tensor__": "x"}, {"__pairs__": [[1, 2]]}, {"__tensor__": torch.ones(1)}, {"pairs": 1}, {1: 2}, {}, []):
        tensors = {}
        plain = json.loads(json.dumps(split_tensors(wanted, tensors)))
        assert str(join_tensors(plain, tensors)) == str(wanted)
    with pytest.raises(TypeError, match="a.0: a checkpoint cannot hold a set"):
        split_tensors({"a": [set()]}, {})


def test_the_last_ones_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path, step, state(step), keep_last=3)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000004", "step-000003", "step-000002"]
    write_checkpoint(tmp_path, 3, state(3), keep_last=3)  # gone on with from an earlier step: what came after is another run's
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000003", "step-000002"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


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
    assert damage(path) is None
    harm(path / file)
    if name == "a torn manifest":
        harm(path / file), harm(path / file)  # the last character is a line's end
        words = "not valid JSON"
    assert words in damage(path)
    with pytest.raises(InputError, match=f"^checkpoint {path}: "):
        read_checkpoint(path)


def test_a_checkpoint_that_was_moved_aside_gets_its_name_back(tmp_path):
    """Killed between the two renames that put a new checkpoint in the place of one of the same step."""
    path = write_checkpoint(tmp_path, 3, state(), keep_last=2)
    path.rename(path.with_name(".step-000003.old"))
    path.with_name(".step-000003.part").mkdir()
    assert list_checkpoints(tmp_path) == []
    mend(tmp_path)
    assert list_checkpoints(tmp_path) == [path] and damage(path) is None
    path.rename(path.with_name(".step-000003.old"))
    with pytest.raises(KeyboardInterrupt), new_directory(path):  # and writing it again does not remove the only copy first
        raise KeyboardInterrupt
    mend(tmp_path)
    assert damage(path) is None


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


# ---- what --resume accepts and refuses


@pytest.fixture(scope="session")
def stopped(toy, tmp_path_factory):
    """{stage: directory} of runs that stopped half-way, with checkpoints at steps 4 and 8. Copy before use."""
    made = {}
    for name in ("sft/full", "rm/full", "ppo/gold"):
        directory = tmp_path_factory.mktemp("stopped") / "run"
        main, flags = stage_of(toy, name, directory)

        def asked(self, step, last=False, plain=rllr.run.Run.checkpoint):
            self.request.name = "SIGTERM" if step == 8 else None
            plain(self, step, last)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(rllr.run.Run, "checkpoint", asked)
            run(main, *flags)
        made[name[: name.index("/")]] = directory
    return made


@pytest.fixture
def copy_of(stopped, tmp_path):
    def copied(stage):
        return Path(shutil.copytree(stopped[stage], tmp_path / "run"))

    return copied


MAINS = {"sft": train_sft.main, "rm": train_rm.main, "ppo": train_ppo.main}


def refused(capsys, stage, *flags, code=2):
    """What a script says when it ends with an error, in one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(MAINS[stage], *flags)
    error = capsys.readouterr().err
    assert ended.value.code == code and error.startswith("error: ") and error.count("\n") == 1
    return error


CHANGED = {
    "sft": ["--seed 1", "--batch_size 4", "--learning_rate 1e-3", "--precision bf16", "--labelled 30", "--weight_decay 0.5", "--lora_rank 2"],
    "rm": ["--seed 1", "--batch_size 4", "--pairs rationale", "--margin 0.5", "--label_pairs drawn"],
    "ppo": ["--seed 1", "--rollout_prompts 4", "--minibatches 4", "--ppo_epochs 3", "--reward label", "--kl_coef 0.2", "--temperature 0.5"],
}  # fmt: skip


@pytest.mark.parametrize("stage, flag", [(stage, flag) for stage in CHANGED for flag in CHANGED[stage]])
def test_another_setting_would_be_another_run(copy_of, capsys, stage, flag):
    directory = copy_of(stage)
    name, value = flag.split()
    before = json.loads((directory / "run.json").read_text())
    error = refused(capsys, stage, "--resume", directory, name, value)
    shown = type(before["config"][name[2:]])(value) if before["config"][name[2:]] is not None else value
    assert f"this would be another run: {name} {shown} (the run has {before['config'][name[2:]]})" in error
    assert json.loads((directory / "run.json").read_text()) == before and len(list_checkpoints(directory)) == 2


def test_all_refused_settings_are_named_at_once(copy_of, capsys):
    error = refused(capsys, "ppo", "--resume", copy_of("ppo"), "--seed", 9, "--gamma", 0.5, "--steps", 12)
    assert "--seed 9 (the run has 0)" in error and "--gamma 0.5 (the run has 1.0)" in error and "steps" not in error


@pytest.mark.parametrize("stage, flags", [
    ("sft", "--log_every 3 --show 1 --save_every 2 --keep_last 5"), ("rm", "--log_every 2 --epochs 3"),
    ("ppo", "--steps 9 --log_every 1 --show_every 1 --save_every 1 --max_ref_kl 55"),
])  # fmt: skip
def test_what_is_printed_kept_and_how_long_it_goes_may_change(copy_of, stage, flags):
    directory = copy_of(stage)
    output = run(MAINS[stage], "--resume", directory, *flags.split())
    assert "resumed from" in output and "another run" not in output
    if stage == "ppo":
        assert read_metrics(directory, "judge/score")[-1]["step"] == 9
    if stage == "sft":
        assert len(list_checkpoints(directory)) == 5


def test_more_epochs_plan_the_learning_rate_anew(copy_of):
    """Eight of 15 steps are done when 30 are asked for: linear decay as if it had been 30 from the start, after a warm-up of one."""
    directory = copy_of("sft")
    run(train_sft.main, "--resume", directory, "--epochs", 6)
    rates = [line["lr"] / 2e-3 for line in read_metrics(directory, "loss")]
    assert rates[:8] == pytest.approx([1 - step / 15 for step in range(8)])
    assert rates[8:] == pytest.approx([1 - (step - 1) / 29 for step in range(8, 30)])


def test_smaller_micro_batches_go_on_with_a_warning(copy_of):
    """They change no gradient, only rounding; and a run that ran out of memory needs them."""
    output = run(train_ppo.main, "--resume", copy_of("ppo"), "--micro_batch_size", 1)
    assert "warning: --micro_batch_size 1 (the run began with 2): equal to rounding from here on, not to the bit" in output


def edit(path, old, new):
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new, 1))


@pytest.mark.parametrize("stage", MAINS)
@pytest.mark.parametrize("file, flag", [("train", "--train_file"), ("dev", "--eval_file")])
def test_other_data_under_the_same_name(copy_of, toy, tmp_path, capsys, stage, file, flag):
    directory, path = copy_of(stage), tmp_path / f"{file}.jsonl"
    shutil.copy(getattr(toy, file), path)
    error = None
    run_again = ["--resume", directory, flag, path]
    if stage == "ppo":
        run(MAINS[stage], *run_again, "--steps", 9)  # a file of another name with the same rows is the same
    row = json.loads(path.read_text().splitlines()[1])
    edit(path, row["text"], row["text"] + " indeed")
    error = refused(capsys, stage, *run_again)
    assert f"this would be another run: {flag} {path} holds " in error and ", the run began with " in error


def test_another_model_under_the_same_name(copy_of, toy, tmp_path, capsys):
    other = shutil.copytree(toy.sft, tmp_path / "other")
    model = load_policy(other)
    with torch.no_grad():
        next(model.parameters()).view(-1)[7] += 1e-3
    model.save_pretrained(other)
    for stage, flag in (("sft", "--model"), ("ppo", "--policy")):
        directory = copy_of(stage)
        assert f"another run: {flag} {other} holds " in refused(capsys, stage, "--resume", directory, flag, other)
        shutil.rmtree(directory)


def test_directories_that_hold_no_run(copy_of, toy, tmp_path, capsys):
    directory = copy_of("ppo")
    policy = ["--policy", toy.sft]
    assert "no such run or checkpoint directory" in refused(capsys, "ppo", "--resume", tmp_path / "none")
    assert "is neither a run's directory nor one of its checkpoints" in refused(capsys, "ppo", "--resume", tmp_path)
    assert "holds no run.json" in refused(capsys, "ppo", *policy, "--output_dir", toy.sft.parent, "--resume")
    assert "is a run of train_ppo.py, not of train_sft.py" in refused(capsys, "sft", "--resume", directory, "--epochs", 3)
    assert "belongs to the run in" in refused(capsys, "ppo", "--resume", directory, "--output_dir", tmp_path / "else")
    assert "--overwrite deletes it" in refused(capsys, "ppo", "--resume", directory, "--overwrite")
    assert "already holds a run; give another, --resume or --overwrite" in refused(
        capsys, "ppo", *policy, "--reward", "gold", "--output_dir", directory
    )
    (directory / "run.json").write_text("[]")
    shutil.rmtree(directory / "checkpoints")
    assert "is not the record of a run" in refused(capsys, "ppo", "--resume", directory)


def test_nothing_to_resume_is_said_and_the_run_begins(toy, tmp_path, monkeypatch):
    main, flags = stage_of(toy, "ppo/gold", tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".writable").touch()  # all that is left of a run that was killed while it opened its directory
    with monkeypatch.context() as patch:
        kill_at(patch, rllr.update, "_losses", 10)  # in the third step; the first checkpoint is due after the fourth
        with pytest.raises(Killed):
            output = run(main, *flags, "--resume")
    assert not (tmp_path / "run" / "checkpoints").exists() and len(read_metrics(tmp_path / "run")) == 3
    output = run(main, *flags, "--resume", "--steps", 4)
    assert "no checkpoint yet" in output and "nothing to resume" not in output
    assert [line["step"] for line in read_metrics(tmp_path / "run", "judge/score")] == [1, 2, 3, 4]


def everything_in(directory):
    return {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", ["sft/full", "rm/full", "ppo/gold"])
def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew(toy, undisturbed, tmp_path, capsys, name):
    """Its models are there, and so is what else somebody has put beside them."""
    directory = Path(shutil.copytree(undisturbed(name), tmp_path / "run"))
    shutil.rmtree(directory / "checkpoints")
    (directory / "notes.txt").write_text("mine")
    before = everything_in(directory)
    error = refused(capsys, name[: name.index("/")], "--resume", directory)
    assert "steps were done, but there is no checkpoint; --overwrite starts again" in error
    assert everything_in(directory) == before


def test_nor_is_one_that_was_to_write_none(toy, tmp_path, capsys, monkeypatch):
    main, flags = stage_of(toy, "ppo/gold", tmp_path / "run")
    with monkeypatch.context() as patch:
        kill_at(patch, rllr.update, "_losses", 10)
        with pytest.raises(Killed):
            run(main, *flags, "--save_every", 0)
    assert "2 steps were done, but there is no checkpoint" in refused(capsys, "ppo", "--resume", tmp_path / "run")


@pytest.mark.parametrize("flags", ["--steps 3", "--seed 9", "--train_file dev"])
def test_what_is_refused_leaves_everything_as_it_was(toy, copy_of, capsys, flags):
    directory = copy_of("ppo")
    before = everything_in(directory)
    name, value = flags.split()
    refused(capsys, "ppo", "--resume", directory, name, toy.dev if value == "dev" else value)
    assert everything_in(directory) == before


def test_a_damaged_checkpoint_falls_back_to_the_one_before(copy_of, capsys):
    directory = copy_of("rm")
    newest, before = list_checkpoints(directory)
    flip(newest / TENSORS)
    output = run(train_rm.main, "--resume", directory)
    assert f"warning: checkpoint {newest} is damaged: {TENSORS} is not the file that was written" in output
    assert f"resumed from {before}" in output
    assert [line["step"] for line in read_metrics(directory, "loss")] == list(range(1, 16))


def test_no_whole_checkpoint_is_left(copy_of, capsys):
    directory = copy_of("rm")
    for path in list_checkpoints(directory):
        cut(path / STATE)
    before = sorted(directory.rglob("*"))
    assert f"no whole checkpoint in {directory / 'checkpoints'}" in refused(capsys, "rm", "--resume", directory)
    assert sorted(directory.rglob("*")) == before


def test_an_older_checkpoint_by_name(copy_of, capsys):
    directory = copy_of("ppo")
    older = directory / "checkpoints" / "step-000004"
    error = refused(capsys, "ppo", "--resume", older, "--steps", 6)  # its best policy may come from what was after it
    assert "an older checkpoint goes on as the run did; change --steps or --epochs from the newest one" in error
    output = run(train_ppo.main, "--resume", older)
    assert "step-000004: 4 of 10 steps are done" in output
    assert [line["step"] for line in read_metrics(directory, "judge/score")] == list(range(1, 11))


def test_a_checkpoint_that_does_not_fit_is_named(copy_of, capsys):
    """Whole by its hashes, but not a state of this run: an error of ours, not a traceback from the depths."""
    directory = copy_of("sft")
    path = list_checkpoints(directory)[0]
    for harm, words in (
        (lambda s: s["parts"].pop("optimizer"), "optimizer"),
        (lambda s: s["parts"]["at"].update(colour=1), "at: it counts"),
        (lambda s: s["parts"]["model"].popitem(), "model: its weights are other ones"),
        (lambda s: s["parts"].update(scheduler=3), "scheduler"),
        (lambda s: s["parts"]["streams"].update(python=[3, [1], None]), "streams"),
        (lambda s: s["parts"]["metrics"].update(bytes="many"), "metrics"),
        (lambda s: s["parts"]["streams"].update(torch=torch.zeros(3, dtype=torch.uint8)), "streams"),
    ):
        whole = read_checkpoint(path)
        changed = read_checkpoint(path)
        harm(changed)
        write_checkpoint(directory, 8, changed, keep_last=2)
        assert f"checkpoint {path}: its state.json does not fit this run: {words}" in refused(capsys, "sft", "--resume", directory)
        write_checkpoint(directory, 8, whole, keep_last=2)


def test_another_machine_is_named(copy_of, monkeypatch):
    now = rllr.run.machine()
    monkeypatch.setattr(rllr.run, "machine", lambda: now | {"threads": 64, "device": "NVIDIA H200"})
    output = run(train_ppo.main, "--resume", copy_of("ppo"), "--steps", 9)
    assert f"warning: threads 64, the run began with {now['threads']}: equal to rounding from here on, not to the bit" in output
    assert "warning: device NVIDIA H200, the run began with cpu" in output


# ---- signals


def test_a_second_signal_stops_at_once():
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGINT)
        assert request.name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_second_signal_ends_the_script_with_130(toy, tmp_path, monkeypatch, capsys):
    main, flags = stage_of(toy, "ppo/gold", tmp_path / "run")

    def twice(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train_ppo, "generate", twice)
    with pytest.raises(SystemExit) as ended:
        run(main, *flags)
    assert ended.value.code == 130 and capsys.readouterr().err.endswith("interrupted\n")


# ---- faults: the state before them is saved, the message names tensor, step and prompts


def poisoned(plain, step, harm):
    """A function whose `step`-th result is harmed."""
    calls = []

    def function(*arguments, **options):
        result = plain(*arguments, **options)
        calls.append(1)
        return harm(result) if len(calls) == step else result

    return function


def test_a_loss_that_is_no_number(toy, tmp_path, monkeypatch, capsys):
    main, flags = stage_of(toy, "sft/full", tmp_path / "run")
    monkeypatch.setattr(train_sft, "sft_loss", poisoned(train_sft.sft_loss, 12, lambda loss: loss * math.nan))
    error = refused(capsys, "sft", *flags, code=1)
    path = tmp_path / "run" / "checkpoints" / "step-000006"
    assert "error: step 7: the SFT loss is nan (prompts train.jsonl:" in error and f"The state before it is in {path}." in error
    monkeypatch.undo()
    output = run(main, "--resume", tmp_path / "run")
    assert f"resumed from {path}" in output


def test_the_state_before_a_fault_is_the_state_before_the_step(toy, tmp_path, monkeypatch, capsys):
    """The fault comes in the middle of a step, after dropout has drawn: resumed, the run is the one without the fault."""
    for name in ("rm/full", "ppo/gold"):
        stage = name[: name.index("/")]
        main, flags = stage_of(toy, name, tmp_path / stage / "whole")
        run(main, *flags)
        main, flags = stage_of(toy, name, tmp_path / stage / "run")
        module, function, call = (train_rm, "rm_loss", 14) if stage == "rm" else (rllr.update, "_losses", 24)
        with monkeypatch.context() as patch:
            harm = lambda result: (_ for _ in ()).throw(RunError("the loss is odd."))  # noqa: E731
            patch.setattr(module, function, poisoned(getattr(module, function), call, harm))
            error = refused(capsys, stage, *flags, code=1)
        assert "The state before it is in" in error or "The newest checkpoint is" in error
        shutil.rmtree(tmp_path / stage / "run" / "last", ignore_errors=True)
        (tmp_path / stage / "run" / "failed_batch.safetensors").unlink(missing_ok=True)
        run(main, *flags, "--resume")
        assert_same_run(tmp_path / stage / "whole", tmp_path / stage / "run")


def nan_in_row(row, value=math.nan):
    def harm(result):
        tensor = result[0] if isinstance(result, tuple) else result
        tensor[row] = value
        return result

    return harm


def test_a_reward_that_is_no_number(toy, tmp_path, monkeypatch, capsys):
    main, flags = stage_of(toy, "ppo/gold", tmp_path / "run")
    monkeypatch.setattr(rllr.roles, "gold_reward", poisoned(rllr.roles.gold_reward, 3, nan_in_row(5)))
    error = refused(capsys, "ppo", *flags, code=1)
    found = list_checkpoints(tmp_path / "run")[0]
    assert "error: step 3: the label score is nan (prompt train.jsonl:" in error and f"in {found}." in error and found.name == "step-000002"
    assert (tmp_path / "run" / "last" / "model.safetensors").is_file()


@pytest.mark.parametrize("what, words", [
    ("policy", "a sampled token's log-probability is nan"), ("value_model", "the value model's output is"),
])  # fmt: skip
def test_weights_that_explode(toy, tmp_path, monkeypatch, capsys, what, words):
    """Inf in the logits; a value model that explodes: in the fourth step, after three good ones."""
    main, flags = stage_of(toy, "ppo/gold", tmp_path / "run")
    plain, models = rllr.update.improve, {}

    def exploding(policy, value_model, *rest):
        stats = plain(policy, value_model, *rest)
        models[0] = models.get(0, 0) + 1
        if models[0] == 3:
            with torch.no_grad():
                target = policy.base_model.layers[0].self_attn.q_proj.weight if what == "policy" else value_model.head.bias
                target.fill_(math.inf)
        return stats

    monkeypatch.setattr(train_ppo, "improve", exploding)
    error = refused(capsys, "ppo", *flags, "--save_every", 2, "--keep_last", 1, "--eval_every", 99, code=1)
    assert f"error: step 4: {words}" in error and "(prompts train.jsonl:" in error and "Traceback" not in error
    # Neither a checkpoint nor a policy with such weights takes the place of a sound one.
    (kept,) = list_checkpoints(tmp_path / "run")
    assert kept.name == "step-000002" and "is not finite" in error and f"The newest checkpoint is {kept}." in error
    saved = [load_file(path) for path in (tmp_path / "run").rglob("*.safetensors")]
    assert all(torch.isfinite(tensor).all() for tensors in saved for tensor in tensors.values())
    assert (tmp_path / "run" / "last").exists() == (what == "value_model")


def test_a_checkpoint_of_unsound_weights_is_not_written(toy, tmp_path, monkeypatch, capsys):
    main, flags = stage_of(toy, "ppo/gold", tmp_path / "run")
    plain = train_ppo.improve

    def exploding(policy, value_model, *rest):
        stats = plain(policy, value_model, *rest)
        value_model.head.bias.data.fill_(math.nan)
        return stats

    monkeypatch.setattr(train_ppo, "improve", exploding)
    error = refused(capsys, "ppo", *flags, "--save_every", 1, code=1)
    assert "a weight of the value_model after step 1 is not finite (head.bias); it is not saved. There is no checkpoint yet." in error


def test_a_fault_within_an_optimisers_step(toy, tmp_path, monkeypatch, capsys):
    """Some weights have moved: nothing is saved as the state before; the newest checkpoint is named, and leads to the same run."""
    main, flags = stage_of(toy, "ppo/gold", tmp_path / "whole")
    run(main, *flags)
    main, flags = stage_of(toy, "ppo/gold", tmp_path / "run")
    module, calls = sys.modules["torch.optim.adam"], []
    plain = module.adam  # called once for each group of weights, two of each model

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) == 42:  # in the sixth step, after the policy's first group
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, "adam", failing)
        error = refused(capsys, "ppo", *flags, code=1)
    newest = list_checkpoints(tmp_path / "run")[0]
    assert f"The newest checkpoint is {newest}." in error and "The state before it" not in error and int(newest.name[-2:]) % 4 == 0
    run(main, "--resume", tmp_path / "run")
    (tmp_path / "run" / "failed_batch.safetensors").unlink(missing_ok=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_an_own_reward_that_fails(toy, tmp_path, monkeypatch, capsys):
    body = "def score(samples):\n    calls.append(1)\n    if len(calls) == 3:\n        {}\n    return [1.0] * len(samples.answers)\n"
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, failure, words in (
        ("fails", "raise KeyError('price')", "--reward fails:score raised KeyError: 'price' ("), ("short", "return [1.0]", "must return 8 numbers"),
    ):  # fmt: skip
        (tmp_path / f"{name}.py").write_text("calls = []\n" + body.format(failure))
        flags = ["--policy", toy.sft, *toy.ppo_flags, "--steps", 5, "--reward", f"{name}:score", "--output_dir", tmp_path / name / "run"]
        error = refused(capsys, "ppo", *flags, code=1)
        assert f"error: step 3: --reward {name}:score" in error and words in error and "step-000002" in error
        assert "its reward is code of yours; give --reward" in refused(capsys, "ppo", "--resume", tmp_path / name / "run")
        run(train_ppo.main, "--resume", tmp_path / name / "run", "--reward", f"{name}:score")
    (tmp_path / "fails.py").write_text("calls = []\n" + body.format("pass"))
    monkeypatch.delitem(sys.modules, "fails")
    error = refused(capsys, "ppo", "--resume", tmp_path / "fails" / "run", "--reward", "fails:score")
    assert "another run: the reward function holds " in error


def test_a_bug_keeps_its_traceback_but_loses_nothing(toy, tmp_path, monkeypatch):
    main, flags = stage_of(toy, "ppo/gold", tmp_path / "run")
    monkeypatch.setattr(train_ppo, "gae", poisoned(train_ppo.gae, 6, lambda result: result[7]))
    with pytest.raises(IndexError):
        run(main, *flags)
    assert list_checkpoints(tmp_path / "run")[0].name == "step-000005"


def test_out_of_memory(toy, tmp_path, monkeypatch, capsys):
    main, flags = stage_of(toy, "ppo/gold", tmp_path / "run")
    harm = lambda result: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(train_ppo, "analyse", poisoned(train_ppo.analyse, 3, harm))
        error = refused(capsys, "ppo", *flags, code=1)
    with monkeypatch.context() as patch:
        patch.setattr(train_ppo, "answer_rows", poisoned(train_ppo.answer_rows, 2, harm))
        outside = refused(capsys, "ppo", *flags, "--overwrite", "--save_every", 1, "--eval_every", 3, code=1)
    assert "2 GiB); go on with --resume and a smaller --eval_batch_size. The newest checkpoint is" in outside and "step-000002" in outside
    assert "step 3: out of memory (CUDA out of memory. Tried to allocate 2 GiB); go on with --resume and a smaller" in error
    assert "step-000002" in error
    assert "resumed from" in run(main, "--resume", tmp_path / "run", "--micro_batch_size", 1)
    with pytest.raises(RuntimeError) as no_room:
        torch.empty(10**15)
    assert rllr.run.out_of_memory(no_room.value) and not rllr.run.out_of_memory(RuntimeError("shapes differ"))


# ---- what looks like a fault and is none


def test_answers_of_one_token_and_a_batch_without_an_end(toy, tmp_path):
    toy.ppo(tmp_path / "ppo", "--reward", "label", "--label_rm", toy.label_rm, "--max_new_tokens", 1, steps=3)
    lines = read_metrics(tmp_path / "ppo", "judge/score")
    assert [line["act/truncated"] for line in lines] == [1, 1, 1] and [line["act/response_len"] for line in lines] == [1, 1, 1]
    assert all(value is not None for line in lines for name, value in line.items()) and lines[0]["judge/score"] <= -1  # cap, penalty


def test_advantages_that_are_all_the_same(toy, tmp_path, monkeypatch):
    """One score for everything, no KL, a zero value model: no advantage, so the policy stays where it is, to the bit."""
    (tmp_path / "my_flat_reward.py").write_text("def flat(samples):\n    return [1.0] * len(samples.answers)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    flags = ["--reward", "my_flat_reward:flat", "--kl_coef", 0, "--lam", 1, "--missing_eos_penalty", 0, "--learning_rate", 1e-2]
    toy.ppo(tmp_path / "ppo", *flags, steps=1)
    (line,) = read_metrics(tmp_path / "ppo", "judge/score")
    assert line["credit/advantage_std"] < 1e-6 and line["improve/grad_norm_policy"] < 1e-4 and line["improve/value_loss"] > 0.1
    before, after = load_policy(toy.sft).state_dict(), load_policy(tmp_path / "ppo" / "last").state_dict()
    assert max((before[name] - after[name]).abs().max() for name in before) < 2e-2  # Adam makes steps of its own size of rounding
    assert all(torch.isfinite(tensor).all() for tensor in after.values())


def test_a_row_of_nothing_but_padding(monkeypatch):
    """A prompt without an answer among the others: no loss, no gradient, nothing for the other rows to notice."""
    from contextlib import nullcontext

    from test_training import policy_model, ppo_config, random_rows, scored_batch

    from rllr.model import ValueModel
    from rllr.ppo import gae, masked_whiten
    from rllr.rewards import shape_rewards
    from rllr.training import make_optimizer
    from rllr.update import Batch, improve

    monkeypatch.setattr(rllr.update, "check_first_ratio", lambda *arguments: 0.0)  # these log-probabilities are off on purpose
    weights = []
    for empty in (False, True):
        policy, value_model, config = policy_model(), ValueModel.from_policy(policy_model()), ppo_config()
        batch = scored_batch(policy, value_model, random_rows(8, 1), config)
        if empty:  # row 8: the prompt of row 0 alone
            def more(tensor, value):
                return torch.cat([tensor, torch.full_like(tensor[:1], value)])

            batch = Batch(
                torch.cat([batch.sequences, batch.sequences[:1]]), torch.cat([batch.prompt_lens, batch.prompt_lens[:1]]),
                more(batch.mask, False), *(more(getattr(batch, name), math.nan) for name in ("logprobs", "ref_logprobs", "values", "entropy")),
            )  # fmt: skip
        scores = torch.arange(len(batch.mask), dtype=torch.float64)
        rewards = shape_rewards(scores, batch.logprobs, batch.ref_logprobs - 0.1, batch.mask, 0.1)
        advantages, batch.returns = gae(rewards, batch.values, batch.mask, 1.0, 0.95)
        batch.advantages = masked_whiten(advantages, batch.mask)
        batch.logprobs, batch.values = batch.logprobs.masked_fill(~batch.mask, 0), batch.values.masked_fill(~batch.mask, 0)
        plan = [[[0, 5, 2, 7] + [8] * empty, [1, 3, 4, 6]]]
        optimizers = [make_optimizer(model, 1e-3, 10) for model in (policy, value_model)]
        improve(policy, value_model, *optimizers, batch, plan, config, nullcontext)
        weights.append(torch.cat([p.detach().flatten() for m in (policy, value_model) for p in m.parameters()]))
    assert torch.isfinite(weights[1]).all() and (weights[0] - weights[1]).abs().max() < 1e-9


# ---- bounds while running


def test_the_policy_may_not_leave_its_reference_too_far(toy, tmp_path, capsys):
    main, flags = stage_of(toy, "ppo/gold", tmp_path / "stop")
    flags += ["--learning_rate", 3e-2, "--max_ref_kl", 0.5]
    error = refused(capsys, "ppo", *flags, code=1)
    assert "the policy has left the SFT policy: " in error and "more than --max_ref_kl 0.5" in error and "The state before it is in" in error
    lines = read_metrics(tmp_path / "stop", "judge/score")
    assert all(line["analyse/kl_sequence"] <= 0.5 for line in lines) and len(lines) < 10


def test_or_the_rollouts_beyond_are_skipped(toy, tmp_path, capsys, monkeypatch):
    main, flags = stage_of(toy, "ppo/gold", tmp_path / "skip")
    flags += ["--learning_rate", 3e-2, "--max_ref_kl", 0.5, "--on_ref_kl", "skip"]
    run(main, *flags)
    lines = read_metrics(tmp_path / "skip", "judge/score")
    skipped = [line for line in lines if line["analyse/kl_sequence"] > 0.5]
    assert len(lines) == 10 and skipped and all("improve/policy_loss" not in line for line in skipped)
    assert all("improve/policy_loss" in line for line in lines if line not in skipped)
    monkeypatch.setattr(train_ppo, "MOST_SKIPPED", len(skipped))
    error = refused(capsys, "ppo", *flags, "--overwrite", code=1)
    assert f"{len(skipped)} rollouts in a row beyond --max_ref_kl 0.5" in error


def test_a_mask_that_does_not_count_its_tokens(toy, tmp_path, monkeypatch, capsys):
    main, flags = stage_of(toy, "ppo/gold", tmp_path / "run")

    def harm(rollout):
        rollout.response_mask[3] = False
        return rollout

    monkeypatch.setattr(train_ppo, "generate", poisoned(train_ppo.generate, 2, harm))
    assert "step 2: the response mask of rows [3] does not count their tokens" in refused(capsys, "ppo", *flags, code=1)


def test_a_reference_that_changes(toy, tmp_path, monkeypatch, capsys):
    main, flags = stage_of(toy, "ppo/gold", tmp_path / "run")
    plain = train_ppo.load_policy_and_reference

    def leaking(config, device):
        policy, reference, frozen, found = plain(config, device)
        monkeypatch.setattr(train_ppo, "improve", poisoned(train_ppo.improve, 2, lambda stats: frozen.lm_head.weight.data.add_(1e-3) is None or stats))
        return policy, reference, frozen, found

    monkeypatch.setattr(train_ppo, "load_policy_and_reference", leaking)
    assert "the reference policy changed during training" in refused(capsys, "ppo", *flags, code=1)


# ---- a full disk


@contextmanager
def small_disk(path, megabytes):
    """A file system of that size at `path`; the test is skipped where mounting one is not allowed."""
    path.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting a small file system needs rights that this user does not have")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_disk_that_fills_up(toy, tmp_path, capsys):
    """A real one: the run stops with what is wrong, the checkpoint before is whole, and with room again the run goes on."""
    with small_disk(tmp_path / "disk", 3) as disk:
        main, flags = stage_of(toy, "ppo/gold", disk / "run")
        error = refused(capsys, "ppo", *flags, "--save_every", 1, "--keep_last", 50, code=1)
        assert "cannot be written: " in error and "No space left on device" in error and "Make room and go on with --resume" in error
        assert "Traceback" not in error and damage(list_checkpoints(disk / "run")[0]) is None
        assert not list((disk / "run").rglob("*.part"))
        subprocess.run(["mount", "-o", "remount,size=40m", str(disk)], check=True)
        assert "resumed from" in run(main, "--resume", disk / "run", "--keep_last", 2)


@pytest.mark.parametrize("failing, call, words", [
    ("write_safetensors", 2, "checkpoint"), ("force_to_disk", 40, "checkpoint"), ("write_json", 9, "cannot be written"),
])  # fmt: skip
def test_writing_fails(toy, tmp_path, monkeypatch, capsys, failing, call, words):
    """The same by an injected error, wherever it strikes."""
    main, flags = stage_of(toy, "ppo/gold", tmp_path / "run")
    place = rllr.files if failing == "force_to_disk" else rllr.checkpoint
    full = lambda result: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(place, failing, poisoned(getattr(place, failing), call, full))
        error = refused(capsys, "ppo", *flags, "--save_every", 2, code=1)
    assert words in error and "No space left on device" in error
    assert all(damage(path) is None for path in list_checkpoints(tmp_path / "run"))
    run(main, "--resume", tmp_path / "run")


def test_the_disk_is_full_when_a_metrics_line_is_written(toy, tmp_path, capsys, monkeypatch):
    """The line stays in the file's buffer, and closing the file tries to write it once more."""
    with small_disk(tmp_path / "disk", 8) as disk:
        main, flags = stage_of(toy, "ppo/gold", disk / "run")

        def fill(stats):
            with open(disk / "filler", "wb", buffering=0) as file, suppress(OSError):
                while file.write(b"x" * 4096):
                    pass
            return stats

        with monkeypatch.context() as patch:
            patch.setattr(train_ppo, "improve", poisoned(train_ppo.improve, 6, fill))
            patch.setattr(rllr.metrics, "json", SimpleNamespace(dumps=lambda line: json.dumps(line) + " " * 20_000))
            error = refused(capsys, "ppo", *flags, code=1)
        assert "metrics.jsonl cannot be written: No space left on device" in error
        (disk / "filler").unlink()
        run(main, "--resume", disk / "run")
        assert [line["step"] for line in read_metrics(disk / "run", "judge/score")] == list(range(1, 11))


def test_what_tokenizers_say_of_a_full_disk(toy):
    """Their own kind of exception, with the system's words in it."""
    from rllr.files import disk_faults
    from rllr.model import load_tokenizer

    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    with pytest.raises(RunError, match="model x cannot be written: No space left on device"):
        with disk_faults("model x"):
            load_tokenizer(toy.sft).backend_tokenizer.save("/dev/full")
    with pytest.raises(ZeroDivisionError), disk_faults("model x"):
        1 / 0


def test_overwrite_spares_the_data_too(toy, tmp_path, capsys):
    for stage, source in (("sft", ["--model", toy.base]), ("rm", ["--policy", toy.sft]), ("ppo", ["--policy", toy.sft, "--reward", "gold"])):
        directory = tmp_path / stage
        directory.mkdir()
        data = shutil.copy(toy.train, directory / "train.jsonl")
        (directory / "run.json").write_text("{}")
        flags = ["--task", toy.task, "--train_file", data, "--eval_file", toy.dev, *source, *ANSWER]
        assert f"--overwrite would delete {data}" in refused(capsys, stage, *flags, "--output_dir", directory, "--overwrite")
        assert Path(data).is_file()


def test_a_reward_model_that_goes_on_has_no_old_statistics_beside_it(toy, undisturbed, tmp_path, monkeypatch):
    """Killed between its new weights and their statistics, it is refused by PPO rather than read in the wrong units."""
    directory = Path(shutil.copytree(undisturbed("rm/full"), tmp_path / "run"))
    monkeypatch.setattr(train_rm, "pairwise_accuracy", lambda chosen, rejected: torch.tensor(2.0))  # better than ever
    kill_at(monkeypatch, train_rm, "show_pairs", 1)
    with pytest.raises(Killed):
        run(train_rm.main, "--resume", directory, "--epochs", 4)
    assert not (directory / "score_statistics.json").exists() and not (directory / "rllr.json").exists()
