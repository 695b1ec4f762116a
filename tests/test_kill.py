"""Killed with SIGKILL, as a process of its own: no code of ours runs any more, what is on the disk must do.

`benchmarks/soak.py` does the same two hundred times.
"""

import random

import pytest
from killing import differences, run_until_done, start

RUNS = {
    "sft": ("train_sft.py", "--epochs 6 --batch_size 4 --learning_rate 2e-3 --show 0"),
    "ppo": (
        "train_ppo.py",
        "--reward gold --steps 25 --rollout_prompts 4 --eval_rows 4 --eval_every 5 --learning_rate 2e-3",
    ),
}


def flags_of(toy, name):
    source = [*toy.data, "--model", toy.base] if name == "sft" else ["--policy", toy.sft]
    return [*source, *RUNS[name][1].split(), "--save_every", 2, "--max_new_tokens", 12]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_killed_again_and_again_ends_in_the_same_weights(toy, tmp_path, name):
    script, flags = RUNS[name][0], flags_of(toy, name)
    undisturbed = start(script, [*flags, "--output_dir", tmp_path / "whole"], tmp_path / "whole.log")
    moments = run_until_done(
        script, flags, tmp_path / "killed", tmp_path / "killed.log", random.Random(name), kills=3, longest=12
    )
    assert undisturbed.wait() == 0, (tmp_path / "whole.log").read_text()
    assert len(moments) == 3, "the run is too short to be killed three times"
    assert not differences(tmp_path / "whole", tmp_path / "killed")
    log = (tmp_path / "killed.log").read_text()
    assert log.count("resumed from") >= 1
    assert not [path for end in ("part", "old") for path in (tmp_path / "killed").rglob(f"*.{end}")]
