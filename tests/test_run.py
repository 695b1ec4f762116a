"""What --resume accepts and refuses, what it does with damage; signals."""

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from stopping import MAINS, Killed, assert_same_run, cut, flip, kill_at, refused, stage_of
from toy_runs import read_metrics, run

import rllr.common.files
import rllr.run.checkpoint
import rllr.run.resume
import rllr.run.run
import rllr.update
import train_ppo
import train_rm
import train_sft
from rllr.common.config import parse_config
from rllr.model.loading import load_policy
from rllr.run.checkpoint import STATE, TENSORS, list_checkpoints, read_checkpoint, write_checkpoint  # fmt: skip
from rllr.run.resume import find_run_to_resume
from rllr.run.stop import StopRequest

# ---- what --resume accepts and refuses


@pytest.fixture(scope="session")
def stopped(toy, tmp_path_factory):
    """{stage: directory} of runs that stopped half-way, with checkpoints at steps 4 and 8. Copy before use."""
    made = {}
    for name in ("sft/full", "rm/full", "ppo/gold"):
        directory = tmp_path_factory.mktemp("stopped") / "run"
        main, flags = stage_of(toy, name, directory)

        def asked(self, step, last=False, must=False, plain=rllr.run.run.Run.checkpoint):
            self.request.name = "SIGTERM" if step == 8 else None
            plain(self, step, last, must)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(rllr.run.run.Run, "checkpoint", asked)
            run(main, *flags)
        made[name[: name.index("/")]] = directory
    return made


@pytest.fixture
def copy_of(stopped, tmp_path):
    def copied(stage):
        return Path(shutil.copytree(stopped[stage], tmp_path / "run"))

    return copied


CHANGED = {
    "sft": ["--seed 1", "--batch_size 4", "--learning_rate 1e-3", "--precision bf16", "--labelled 30",
        "--weight_decay 0.5", "--lora_rank 2"],
    "rm": ["--seed 1", "--batch_size 4", "--pairs rationale", "--margin 0.5", "--label_pairs drawn"],
    "ppo": ["--seed 1", "--rollout_prompts 4", "--minibatches 4", "--ppo_epochs 3", "--reward label", "--kl_coef 0.2",
        "--temperature 0.5"],
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
    """Eight of 15 steps are done when 30 are asked for: linear decay as if it had been 30 from the start, after a
    warm-up of one."""
    directory = copy_of("sft")
    run(train_sft.main, "--resume", directory, "--epochs", 6)
    rates = [line["lr"] / 2e-3 for line in read_metrics(directory, "loss")]
    assert rates[:8] == pytest.approx([1 - step / 15 for step in range(8)])
    assert rates[8:] == pytest.approx([1 - (step - 1) / 29 for step in range(8, 30)])


def test_smaller_micro_batches_go_on_with_a_warning(copy_of):
    """They change no gradient, only rounding; and a run that ran out of memory needs them."""
    output = run(train_ppo.main, "--resume", copy_of("ppo"), "--micro_batch_size", 1)
    assert (
        "warning: --micro_batch_size 1 (the run began with 2): equal to rounding from here on, not to the bit" in output
    )


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
    assert "is a run of train_ppo.py, not of train_sft.py" in refused(
        capsys, "sft", "--resume", directory, "--epochs", 3
    )
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


@pytest.mark.parametrize("name", ["sft/full", "rm/full", "ppo/gold"])
def test_killed_while_the_first_checkpoint_is_written(toy, undisturbed, tmp_path, monkeypatch, name):
    """As many steps are done as there are to the first checkpoint, and it is not there: not lost, but never made."""
    main, flags = stage_of(toy, name, tmp_path / "run")
    with monkeypatch.context() as patch:
        kill_at(patch, rllr.run.run, "write_checkpoint", 1)
        with pytest.raises(Killed):
            run(main, *flags)
    assert "no checkpoint yet" in run(main, *flags, "--resume")
    assert_same_run(undisturbed(name), tmp_path / "run")


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
    config, pairs = json.loads((directory / "run.json").read_text())["config"], directory / "pairs.jsonl"
    steps = config["epochs"] * math.ceil(len(pairs.read_text().splitlines()) / config["batch_size"])
    assert [line["step"] for line in read_metrics(directory, "loss")] == list(range(1, steps + 1)) and steps > 8


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
        (lambda s: s["parts"]["loop"].update(colour=1), "loop: it counts"),
        (lambda s: s["parts"]["model"].popitem(), "model: its weights are other ones"),
        (lambda s: s["parts"].update(schedule=3), "schedule"),
        (lambda s: s["parts"]["streams"].update(python=[3, [1], None]), "streams"),
        (lambda s: s["parts"]["metrics"].update(bytes="many"), "metrics"),
        (lambda s: s["parts"]["streams"].update(torch=torch.zeros(3, dtype=torch.uint8)), "streams"),
    ):
        whole = read_checkpoint(path)
        changed = read_checkpoint(path)
        harm(changed)
        write_checkpoint(directory, 8, changed, keep_last=2)
        assert f"checkpoint {path}: its state.json does not fit this run: {words}" in refused(
            capsys, "sft", "--resume", directory
        )
        write_checkpoint(directory, 8, whole, keep_last=2)


def test_a_runs_record_cannot_switch_code_on(copy_of):
    """--trust_remote_code counts where it is typed; whoever can write a run's files must not be able to say it."""
    directory = copy_of("sft")
    state = read_checkpoint(list_checkpoints(directory)[0])
    state["run"]["config"]["trust_remote_code"] = True
    write_checkpoint(directory, 8, state, keep_last=2)
    config = parse_config(train_sft.Config, ["--resume", str(directory)])
    assert (
        find_run_to_resume("sft", config, None).recorded["config"]["trust_remote_code"] is True
        and config.trust_remote_code is False
    )
    config = parse_config(train_sft.Config, ["--resume", str(directory), "--trust_remote_code"])
    find_run_to_resume("sft", config, None)
    assert config.trust_remote_code is True


@pytest.mark.parametrize(
    "setting, value", [("epochs", "x"), ("task", [1]), ("train_file", 5.5), ("max_new_tokens", None), ("seed", 1e999)]
)
def test_a_record_with_odd_settings(copy_of, capsys, setting, value):
    directory = copy_of("sft")
    state = read_checkpoint(list_checkpoints(directory)[0])
    state["run"]["config"][setting] = value
    write_checkpoint(directory, 8, state, keep_last=2)
    error = refused(capsys, "sft", "--resume", directory)
    assert f"run.json: {setting}: " in error or "no such file" in error  # 5.5 is a name


def test_another_machine_is_named(copy_of, monkeypatch):
    now = rllr.run.run.machine()
    monkeypatch.setattr(rllr.run.run, "machine", lambda: now | {"threads": 64, "device": "NVIDIA H200"})
    output = run(train_ppo.main, "--resume", copy_of("ppo"), "--steps", 9)
    assert (
        f"warning: threads 64, the run began with {now['threads']}: equal to rounding from here on, not to the bit"
        in output
    )
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
