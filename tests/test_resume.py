"""A run that is stopped and gone on with is the run that was never stopped: every weight to the bit, every metric line."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import train_ppo
import train_rm
import train_sft
from safetensors.torch import load_file
from toy_runs import ANSWER, read_metrics, run

import rllr.run
import rllr.update
from rllr import checkpoint

ROOT = Path(__file__).parent.parent
LORA = ["--lora_rank", 2]


class Killed(BaseException):
    """Stands for a death in which no code of ours runs any more."""


def stage_of(toy, name, directory):
    """(main, flags) of a short run: 15 steps or so, a checkpoint every fourth, several micro-batches to a step."""
    stage, _, variant = name.partition("/")
    lora = LORA if variant.startswith("lora") else []
    common = ["--save_every", 4, "--output_dir", directory, *ANSWER, *lora]
    small = [*common, "--batch_size", 8, "--micro_batch_size", 4, "--learning_rate", 2e-3, "--dropout", 0.1]
    if stage == "sft":
        model = ["--model", "tiny", "--tiny_epochs", 1] if variant == "tiny" else ["--model", toy.base]
        return train_sft.main, [*toy.data, *model, *small, "--epochs", 3, "--show", 0]
    if stage == "rm":
        kind = ["--pairs", "rationale"] if variant == "rationale" else []
        return train_rm.main, ["--policy", toy.sft, *small, *kind, "--epochs", 3, "--patience", 99]
    own = {
        "gold": ["--reward", "gold", "--kl_control", "adaptive", "--kl_horizon", 50, "--warmup", 0.3],
        "mixed": ["--reward", "mixed", "--score_norm", "running", "--ppo_epochs", 2, "--threshold", "q0.7"],
        "lora": ["--reward", "label"],
    }[variant]
    models = ["--label_rm", toy.label_rm] if variant != "gold" else []
    models += ["--rationale_rm", toy.rationale_rm] if variant == "mixed" else []
    rates = ["--learning_rate", 2e-3, "--value_learning_rate", 2e-3, "--eval_every", 3]
    prompts = ["--rollout_prompts", 8, "--micro_batch_size", 2, "--eval_rows", 8, "--steps", 10]
    return train_ppo.main, ["--policy", toy.sft, *own, *models, *rates, *prompts, *common]


RUNS = ["sft/full", "sft/tiny", "sft/lora", "rm/full", "rm/lora", "rm/rationale", "ppo/gold", "ppo/mixed", "ppo/lora"]


def kill_at(monkeypatch, module, name, call):
    """The `call`-th call of a function dies instead."""
    plain, calls = getattr(module, name), []

    def dying(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return plain(*arguments, **options)

    monkeypatch.setattr(module, name, dying)


def contents(directory):
    """{path: tensors} of every model in a run's directory, its checkpoints too."""
    return {str(path.relative_to(directory)): load_file(path) for path in sorted(Path(directory).rglob("*.safetensors"))}


def assert_same_run(first, second):
    """Equal weights to the bit in the same files, equal metrics line by line, equal records."""
    ours, theirs = contents(first), contents(second)
    assert ours.keys() == theirs.keys() and len(ours) >= 2
    for path in ours:
        assert ours[path].keys() == theirs[path].keys()
        different = [name for name in ours[path] if not torch.equal(ours[path][name], theirs[path][name])]
        assert not different, f"{path}: {different[:5]}"
    timeless = [
        [{k: v for k, v in line.items() if not k.startswith(("time/", "seconds", "act/tokens_per_second"))} for line in read_metrics(d)]
        for d in (first, second)
    ]
    assert timeless[0] == timeless[1] and len(timeless[0]) > 5
    for path in Path(first).rglob("rllr.json"):
        mine, other = (json.loads((Path(d) / path.relative_to(first)).read_text()) for d in (first, second))
        for record in (mine, other):
            record["config"].pop("output_dir")
        assert mine == other


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
    plain, steps = rllr.run.Run.checkpoint, []

    def checkpoint_after_signal(self, step, last=False):
        steps.append(step)
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, step, last)

    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        patch.setattr(rllr.run.Run, "checkpoint", checkpoint_after_signal)
        with pytest.raises(SystemExit) as stop:
            run(main, *flags)
    assert stop.value.code == 75 and steps == [1, 2, 3, 4, 5, 6]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    error = capsys.readouterr().err
    assert "SIGTERM: finishing this step, then saving" in error and f"stopped after step 6; go on with --resume {tmp_path / 'run'}" in error
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
    flags = [*toy.data, "--model", toy.base, "--batch_size", 8, "--learning_rate", 2e-3, "--schedule", "constant", "--warmup", 0,
             "--dropout", 0.1, "--show", 0, *ANSWER, "--save_every", 3]  # fmt: skip
    run(train_sft.main, *flags, "--epochs", 4, "--output_dir", tmp_path / "whole")
    run(train_sft.main, *flags, "--epochs", 2, "--output_dir", tmp_path / "parts")
    output = run(train_sft.main, "--resume", tmp_path / "parts", "--epochs", 4)
    assert "10 -> 20 steps: the learning rate's schedule is planned anew" in output
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
