"""Starts a script as a process of its own, kills it with SIGKILL again and again, goes on with it until it ends.

`benchmarks/soak.py` does this two hundred times, `test_kill.py` a handful.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
CLOCK = ("time/", "seconds", "act/tokens_per_second")  # what a metric line holds of the clock
MOMENTS = ("running", "writing")  # when to kill: anywhere in training, or while a checkpoint is being written


def start(script, flags, log):
    """A script's process, one thread, its output appended to a file."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    with open(log, "a") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)


def kill_at(process, directory, moment, lines, patience=120.0):
    """SIGKILL a process once it has written so many metric lines, or, "writing", at the first checkpoint it writes
    after that.

    Counted in lines, not seconds: what a test kills must not hang on how busy the machine is. Returns whether it was
    killed: it may have ended before.
    """
    fewest = _lines(directory)  # goes down when a resumed run cuts the file back to its checkpoint
    for _ in range(int(patience / 0.0005)):
        if process.poll() is not None:
            return False
        now = _lines(directory)
        fewest = min(fewest, now)
        if (
            now > fewest
            and now - fewest >= lines
            and (moment == "running" or any(Path(directory).glob("checkpoints/.*.part")))
        ):
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.0005)
    raise AssertionError(f"the process neither trained nor ended within {patience} s")


def _lines(directory):
    try:
        return (Path(directory) / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def run_until_done(script, flags, directory, log, rng, kills, longest):
    """Start, kill and resume a script until it was killed `kills` times, then let it end. Returns the moments it was
    killed at.

    rng: chooses moments and places, up to `longest` metric lines after each start. RuntimeError, with the log's end,
    if it fails.
    """
    done = []
    while True:
        process = start(script, [*flags, "--output_dir", directory, "--resume"], log)
        moment = rng.choice(MOMENTS)
        if len(done) < kills and kill_at(process, directory, moment, rng.uniform(0, longest)):
            done.append(moment)
            continue
        if process.wait() != 0:
            raise RuntimeError(f"exit code {process.returncode}:\n{Path(log).read_text()[-2000:]}")
        return done


def differences(first, second):
    """What differs between two runs' directories: names of tensors and metric lines, [] for runs equal to the bit."""
    found, tensors = (
        [],
        [{str(p.relative_to(d)): p for p in sorted(Path(d).rglob("*.safetensors"))} for d in (first, second)],
    )
    if tensors[0].keys() != tensors[1].keys():
        found.append(f"files {sorted(tensors[0].keys() ^ tensors[1].keys())}")
    for name in tensors[0].keys() & tensors[1].keys():
        ours, theirs = load_file(tensors[0][name]), load_file(tensors[1][name])
        found += [f"{name}: {key}" for key in ours if key not in theirs or not torch.equal(ours[key], theirs[key])]
    lines = [(Path(d) / "metrics.jsonl").read_text().splitlines() for d in (first, second)]
    if len(lines[0]) != len(lines[1]):
        found.append(f"metrics: {len(lines[0])} and {len(lines[1])} lines")
    for number, pair in enumerate(zip(*lines), 1):
        a, b = ({k: v for k, v in json.loads(line).items() if not k.startswith(CLOCK)} for line in pair)
        found += [f"metrics line {number}: {a} {b}"] if a != b else []
    return found
