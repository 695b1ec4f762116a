"""Short runs of every stage, ways to end them before their end, and what must be equal afterwards."""

import json
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_runs import ANSWER, read_metrics, run

import train_ppo
import train_rm
import train_sft

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
    return {
        str(path.relative_to(directory)): load_file(path) for path in sorted(Path(directory).rglob("*.safetensors"))
    }


def assert_same_run(first, second):
    """Equal weights to the bit in the same files, equal metrics line by line, equal records."""
    ours, theirs = contents(first), contents(second)
    assert ours.keys() == theirs.keys() and len(ours) >= 2
    for path in ours:
        assert ours[path].keys() == theirs[path].keys()
        different = [name for name in ours[path] if not torch.equal(ours[path][name], theirs[path][name])]
        assert not different, f"{path}: {different[:5]}"
    timeless = [
        [
            {k: v for k, v in line.items() if not k.startswith(("time/", "seconds", "act/tokens_per_second"))}
            for line in read_metrics(d)
        ]
        for d in (first, second)
    ]
    assert timeless[0] == timeless[1] and len(timeless[0]) > 5
    for path in Path(first).rglob("rllr.json"):
        mine, other = (json.loads((Path(d) / path.relative_to(first)).read_text()) for d in (first, second))
        for record in (mine, other):
            record["config"].pop("output_dir")
        assert mine == other


MAINS = {"sft": train_sft.main, "rm": train_rm.main, "ppo": train_ppo.main}


def refused(capsys, stage, *flags, code=2):
    """What a script says when it ends with an error, in one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(MAINS[stage], *flags)
    error = capsys.readouterr().err
    assert ended.value.code == code and error.startswith("error: ") and error.count("\n") == 1
    return error


def poisoned(plain, step, harm):
    """A function whose `step`-th result is harmed."""
    calls = []

    def function(*arguments, **options):
        result = plain(*arguments, **options)
        calls.append(1)
        return harm(result) if len(calls) == step else result

    return function


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


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
