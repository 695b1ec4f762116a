"""What several processes cost and give: PPO steps with 1 and 2 processes, time and memory of each rank.

    python benchmarks/ranks.py --policy runs/demo/sft --label_rm runs/demo/rm-label      # after `make demo`

The same run under torchrun and alone, in turn, --turns times; a step's time is the difference of `seconds` in
metrics.jsonl, the first two steps are left out. Memory is the peak of each process (VmHWM). Bytes: what one rank sends
in a step, by count of the tensors (a ring sends each of them twice, but for a share of 1 / processes).
"""

import argparse
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, step_times, write_result
from safetensors import safe_open


def run(processes, args, directory):
    """(seconds of each step, peak megabytes of each rank) of one run."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    flags = {"policy": args.policy, "label_rm": args.label_rm, "steps": args.steps, "output_dir": directory,
             "rollout_prompts": args.rollout_prompts, "eval_rows": 20, "save_every": 0, "eval_every": args.steps + 1,
             "log_every": args.steps + 1, "show_every": args.steps + 1}  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    started = subprocess.Popen(
        [*start, str(ROOT / "train_ppo.py"), *words], env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    peaks: dict[int, float] = {}
    while started.poll() is None:
        for pid in [started.pid] if processes == 1 else children(started.pid):
            peaks[pid] = max(peaks.get(pid, 0.0), peak_of(pid))
        time.sleep(0.2)
    if started.returncode:
        sys.exit(started.stderr.read()[-2000:])
    times = [seconds for step, seconds in step_times(directory).items() if step > 2]
    return times, sorted(peaks.values())[-processes:]


def children(parent):
    """Processes that a process has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"PPid:\t{parent}\n" in (path / "status").read_text():
                found.append(int(path.name))
        except OSError:  # it has ended
            pass
    return found


def peak_of(pid):
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024 if "VmHWM" in status else 0.0


def weights_of(directory):
    """Number of a model's weights."""
    with safe_open(Path(directory) / "model.safetensors", "pt") as file:
        names = file.keys()
        shapes = [file.get_slice(name).get_shape() for name in names]
    return sum(math.prod(shape) for shape in shapes)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--label_rm", required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rollout_prompts", type=int, default=128)
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="rllr-ranks-"))
    times: dict[int, list] = {1: [], 2: []}
    peaks: dict[int, list] = {}
    for turn in range(args.turns):
        for processes in times:
            found, peaks[processes] = run(processes, args, home / f"{processes}-{turn}")
            times[processes].append(statistics.median(found))
    shutil.rmtree(home)
    middle = {processes: statistics.median(found) for processes, found in times.items()}
    updates, count = 2, weights_of(args.policy) + weights_of(args.label_rm)  # minibatches of a pass; policy and value
    sent = 2 * (1 - 1 / 2) * updates * count * 4 / 1e6
    record = {
        "rollout_prompts": args.rollout_prompts,
        "seconds": {str(processes): round(value, 3) for processes, value in middle.items()},
        "ratio": round(middle[1] / middle[2], 2),
        "peak_mb": {str(processes): [round(value) for value in found] for processes, found in peaks.items()},
        "gradients_mb": round(sent, 1),
    }
    lines = [
        "| processes | seconds per step | peak memory of each, MB |", "|---|---|---|",
        *(f"| {n} | {middle[n]:.2f} | {', '.join(f'{value:.0f}' for value in peaks[n])} |" for n in middle), "",
        f"{args.rollout_prompts} prompts a step, one thread a process, median of {args.turns} turns: two processes are "
        f"{record['ratio']:.2f} times as fast.",
        f"Each rank sends {sent:.1f} MB of gradients in a step of {updates} updates ({count:,} weights of policy and "
        "value model), beside a few kilobytes of answers and scores.",
    ]  # fmt: skip
    write_result("ranks", "one process and two", lines, record)


if __name__ == "__main__":
    main()
