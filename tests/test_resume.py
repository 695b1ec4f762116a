"""A run that is stopped and gone on with is the run that was never stopped: every weight to the bit, every metric
line."""

import json
import os
import shutil
import signal

import pytest
from stopping import RUNS, Killed, assert_same_run, kill_at, stage_of
from toy_runs import ANSWER, run

import rllr.run.run
import rllr.update
import train_ppo
import train_rm
import train_sft
from rllr.run import checkpoint


def die_and_resume(toy, name, directory, monkeypatch, module, function, call):
    """A run that dies at a function's n-th call, and is gone on with."""
    main, flags = stage_of(toy, name, directory)
    with monkeypatch.context() as patch:
        kill_at(patch, module, function, call)
        with pytest.raises(Killed):
            run(main, *flags)
    return run(main, *flags, "--resume")


# ---- to the bit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_killed_within_a_step_and_resumed(toy, undisturbed, tmp_path, monkeypatch, name):
    """Between two micro-batches of a step in the middle of an epoch: what came after the checkpoint is done again."""
    places = {"sft": (train_sft, "sft_loss", 13), "rm": (train_rm, "rm_loss", 14), "ppo": (rllr.update, "_losses", 28)}
    place = places[name[: name.index("/")]]
    if name == "ppo/mixed":
        place = (*place[:2], 56)  # two epochs
    output = die_and_resume(toy, name, tmp_path / "run", monkeypatch, *place)
    assert f"resumed from {tmp_path / 'run' / 'checkpoints' / 'step-000004'}" in output
    assert_same_run(undisturbed(name), tmp_path / "run")


@pytest.mark.parametrize("name", RUNS)
def test_stopped_by_a_signal_and_resumed(toy, undisturbed, tmp_path, monkeypatch, capsys, name):
    """SIGTERM in the sixth step: the step ends, the state is saved, exit code 75; and the run goes on from there."""
    main, flags = stage_of(toy, name, tmp_path / "run")
    plain, steps = rllr.run.run.Run.checkpoint, []

    def checkpoint_after_signal(self, step, last=False, must=False):
        steps.append(step)
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, step, last, must)

    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        patch.setattr(rllr.run.run.Run, "checkpoint", checkpoint_after_signal)
        with pytest.raises(SystemExit) as stop:
            run(main, *flags)
    assert stop.value.code == 75 and steps == [1, 2, 3, 4, 5, 6]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    error = capsys.readouterr().err
    assert (
        "SIGTERM: finishing this step, then saving" in error
        and f"stopped after step 6; go on with --resume {tmp_path / 'run'}" in error
    )
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path / "run")] == ["step-000006", "step-000004"]
    output = run(main, "--resume", tmp_path / "run")  # no other flag: the settings are the run's own
    assert "step-000006" in output
    assert_same_run(undisturbed(name), tmp_path / "run")


@pytest.mark.parametrize("name", ["sft/full", "rm/full", "ppo/gold"])
def test_a_finished_run_is_finished_again_without_a_step(toy, undisturbed, tmp_path, name):
    shutil.copytree(undisturbed(name), tmp_path / "run")
    output = run(stage_of(toy, name, None)[0], "--resume", tmp_path / "run")
    assert "resumed from" in output
    assert_same_run(undisturbed(name), tmp_path / "run")


def test_more_steps_than_at_first(toy, tmp_path):
    """N epochs and N more are 2 N epochs, where the schedule does not look at the end."""
    flags = [*toy.data, "--model", toy.base, "--batch_size", 8, "--learning_rate", 2e-3, "--schedule", "constant",
        "--warmup", 0,
             "--dropout", 0.1, "--show", 0, *ANSWER, "--save_every", 3]  # fmt: skip
    run(train_sft.main, *flags, "--epochs", 4, "--output_dir", tmp_path / "whole")
    run(train_sft.main, *flags, "--epochs", 2, "--output_dir", tmp_path / "parts")
    output = run(train_sft.main, "--resume", tmp_path / "parts", "--epochs", 4)
    assert "10 -> 20 steps: the learning rate follows a new schedule" in output
    record = json.loads((tmp_path / "parts" / "rllr.json").read_text())
    if record["config"]["epochs"] == 2:  # the best epoch was one of the first two, and is kept as it was recorded
        record["config"]["epochs"] = 4
        (tmp_path / "parts" / "rllr.json").write_text(json.dumps(record))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_fewer_steps_than_are_done(toy, undisturbed, tmp_path, capsys):
    shutil.copytree(undisturbed("ppo/gold"), tmp_path / "run")
    with pytest.raises(SystemExit):
        run(train_ppo.main, "--resume", tmp_path / "run", "--steps", 3)
    assert "step-000010: 10 steps are done, more than the 3 asked for" in capsys.readouterr().err
