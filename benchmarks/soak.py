"""Two hundred SIGKILLs: kill runs at random moments, also while they write a checkpoint, resume them, and compare.

    python benchmarks/soak.py --kills 200

Each stage (SFT, reward model, PPO; full models and adapters) runs once without a kill and then many times with several
kills. Every such run must end in the same weights, checkpoints and metrics as the first one, to the bit. Ctrl-C ends
the benchmark early and writes the results so far.
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from common import ROOT, write_result

sys.path.insert(0, str(ROOT / "tests"))

from killing import differences, run_until_done, start  # noqa: E402
from toy_runs import toy_runs  # noqa: E402

KILLS_PER_RUN = 5
SHORT = "--save_every 2 --max_new_tokens 12"
LAST_LINE = 20  # a run is killed before it has written this many metric lines
PPO = "--steps 30 --rollout_prompts 8 --eval_rows 8 --eval_every 5"
STAGES = {  # script, flags
    "sft": ("train_sft.py", "--epochs 6 --batch_size 4 --learning_rate 2e-3 --dropout 0.1 --show 0"),
    "sft, LoRA": ("train_sft.py", "--epochs 6 --batch_size 4 --dropout 0.1 --show 0 --lora_rank 2"),
    "rm": ("train_rm.py", "--epochs 8 --batch_size 4 --learning_rate 2e-3 --dropout 0.1 --patience 99"),
    "rm, LoRA": ("train_rm.py", "--epochs 8 --batch_size 4 --dropout 0.1 --patience 99 --lora_rank 2"),
    "ppo": ("train_ppo.py", f"--reward mixed --score_norm running --kl_control adaptive --learning_rate 1e-3 {PPO}"),
    "ppo, LoRA": ("train_ppo.py", f"{PPO} --lora_rank 2"),
}


def command_of(toy, name):
    """(script, flags) of a stage, with the inputs from the toy runs."""
    script, flags = STAGES[name]
    inputs = {
        "train_sft.py": [*toy.data, "--model", toy.base],
        "train_rm.py": ["--policy", toy.sft],
        "train_ppo.py": ["--policy", toy.sft, "--label_rm", toy.label_rm],
    }[script]
    inputs += ["--rationale_rm", toy.rationale_rm] if "mixed" in flags else []
    return script, [*inputs, *flags.split(), *SHORT.split()]


def once(name, toy, root, rng, *, whole, rows, failures):
    """Run a stage, kill it several times, and compare it with the run without a kill.

    whole: {stage: directory of the run without a kill}; rows: {stage: counts}; both are updated, and so is failures.
    """
    script, flags = command_of(toy, name)
    if name not in whole:
        whole[name] = root / f"whole-{name}"
        if start(script, [*flags, "--output_dir", whole[name]], root / "whole.log").wait():
            raise SystemExit((root / "whole.log").read_text()[-2000:])
    number = sum(row["runs"] for row in rows.values())
    directory, log = root / f"run-{number}", root / f"run-{number}.log"
    moments = run_until_done(script, flags, directory, log, rng, KILLS_PER_RUN, LAST_LINE)
    found, text = differences(whole[name], directory), log.read_text()
    rows[name].update(runs=1, kills=len(moments), writing=moments.count("writing"), differ=int(bool(found)))
    rows[name].update(resumed=text.count("resumed from"), damaged=text.count("is damaged"))
    failures += [f"{name}, {directory}: {found[:5]}"] if found else []
    print(name, dict(rows[name]), *failures[-1:], flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="in all")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which runs are killed")
    args = parser.parse_args()
    toy, root = toy_runs(), Path(tempfile.mkdtemp(prefix="rllr-soak-"))
    rng, began = random.Random(args.seed), time.monotonic()
    whole, rows, failures = {}, {name: Counter() for name in STAGES}, []
    try:
        while sum(row["kills"] for row in rows.values()) < args.kills:
            name = min(STAGES, key=lambda name: rows[name]["kills"])
            once(name, toy, root, rng, whole=whole, rows=rows, failures=failures)
    except KeyboardInterrupt:
        print("stopped early", flush=True)
    columns = ("runs", "kills", "writing", "resumed", "damaged", "differ")
    kills, seconds = sum(row["kills"] for row in rows.values()), time.monotonic() - began
    lines = [
        f"{kills} kills, seed {args.seed}, {seconds:.0f} s. Writing: killed while a checkpoint was being written. "
        "Resumed: from a checkpoint; the other runs were killed before their first one and started again. Damaged: "
        "incomplete checkpoints that were found. Differ: runs whose weights or metrics differ from those of the run "
        "without a kill.",
        "",
        "| stage | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
        *(f"| {name} | " + " | ".join(str(row[column]) for column in columns) + " |" for name, row in rows.items()),
    ]
    record = {"seed": args.seed, "failures": failures} | {name: dict(row) for name, row in rows.items()}
    write_result("soak", "SIGKILL at random moments", lines, record)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
