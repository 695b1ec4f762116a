"""What several processes cost and give: PPO steps with 1 process, 2, and 2 that share the weights; time and memory.

    python benchmarks/ranks.py --policy runs/demo/sft --label_rm runs/demo/rm-label      # after `make demo`
    python benchmarks/ranks.py --policy DIR -- --reward gold --task sst2 --train_file train.jsonl --eval_file dev.jsonl

The same run under torchrun and alone, in turn, --turns times; a step's time is the difference of `seconds` in
metrics.jsonl, the first two steps are left out. Memory is the peak of each process (VmHWM). Bytes: what one rank sends
in a step, by count of the tensors. A ring that adds up sends each of them twice, one that puts parts together or adds
up into parts once, but for a share of 1 / processes.
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

CASES = {"1": (1, []), "2": (2, []), "2, --shard": (2, ["--shard"])}  # {name: (processes, flags)}
UPDATES = 2  # minibatches of a pass


def run(case, args, directory):
    """(seconds of each step, peak megabytes of each rank) of one run."""
    (processes, more), reward = CASES[case], ["--label_rm", args.label_rm] if args.label_rm else []
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    flags = {"policy": args.policy, "steps": args.steps, "output_dir": directory, "minibatches": UPDATES,
             "rollout_prompts": args.rollout_prompts, "eval_rows": 20, "save_every": 0, "eval_every": args.steps + 1,
             "log_every": args.steps + 1, "show_every": args.steps + 1}  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    started = subprocess.Popen(
        [*start, str(ROOT / "train_ppo.py"), *words, *reward, *args.more, *more],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
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
    parser.add_argument("--label_rm")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rollout_prompts", type=int, default=128)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--name", default="one process and two", help="of the section that is written")
    parser.add_argument("more", nargs="*", help="after --: flags of train_ppo.py")
    args = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="rllr-ranks-"))
    times: dict[str, list] = {case: [] for case in CASES}
    peaks: dict[str, list] = {}
    for turn in range(args.turns):
        for number, case in enumerate(CASES):
            found, peaks[case] = run(case, args, home / f"{number}-{turn}")
            times[case].append(statistics.median(found))
    shutil.rmtree(home)
    middle = {case: statistics.median(found) for case, found in times.items()}
    policy = weights_of(args.policy)
    judge = weights_of(args.label_rm) if args.label_rm else 0
    value = judge or policy
    added_up = 2 * UPDATES * (policy + value)
    # forward, backward, gradients of each update; rollout, scores of policy, reference and value model; the judge
    in_parts = 3 * UPDATES * (policy + value) + policy + policy + policy + value + judge
    sent = {"2": added_up, "2, --shard": in_parts}
    sent = {case: (1 - 1 / 2) * count * 4 / 1e6 for case, count in sent.items()}
    record = {
        "rollout_prompts": args.rollout_prompts,
        "seconds": {case: round(value, 3) for case, value in middle.items()},
        "ratio": {case: round(middle["1"] / value, 2) for case, value in middle.items()},
        "peak_mb": {case: [round(value) for value in found] for case, found in peaks.items()},
        "sent_mb": {case: round(value, 1) for case, value in sent.items()},
    }
    lines = [
        "| processes | seconds per step | times as fast | peak memory of each, MB | a rank sends in a step, MB |",
        "|---|---|---|---|---|",
        *(f"| {case} | {middle[case]:.2f} | {record['ratio'][case]:.2f} | "
          f"{', '.join(f'{value:.0f}' for value in peaks[case])} | {sent.get(case, 0):.1f} |" for case in CASES), "",
        f"{args.rollout_prompts} prompts a step, {UPDATES} updates, one thread a process, median of {args.turns} "
        f"turn{'s' if args.turns > 1 else ''}. "
        f"Policy {policy:,} weights, value model {value:,}. Sent: gradients or parts of weights, in float32, beside a "
        "few kilobytes of answers and scores; evaluations on dev not counted.",
    ]  # fmt: skip
    write_result("ranks", args.name, lines, record)


if __name__ == "__main__":
    main()
