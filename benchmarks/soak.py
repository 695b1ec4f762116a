"""Two hundred SIGKILLs: runs are killed at random moments, also while they write a checkpoint, gone on with, and compared.

    python benchmarks/soak.py --kills 200

Each stage (SFT, reward model, PPO; in full and with adapters) runs once undisturbed and then again and again, each time
killed several times. Every such run must end in the same weights, checkpoints and metrics as the undisturbed one, to the bit. Ctrl-C ends it early, with what there is.
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
STAGES = {  # script, flags, metric lines within which it is killed
    "sft": ("train_sft.py", "--epochs 6 --batch_size 4 --learning_rate 2e-3 --dropout 0.1 --show 0", 20),
    "sft, LoRA": ("train_sft.py", "--epochs 6 --batch_size 4 --dropout 0.1 --show 0 --lora_rank 2", 20),
    "rm": ("train_rm.py", "--epochs 8 --batch_size 4 --learning_rate 2e-3 --dropout 0.1 --patience 99", 20),
    "rm, LoRA": ("train_rm.py", "--epochs 8 --batch_size 4 --dropout 0.1 --patience 99 --lora_rank 2", 20),
    "ppo": ("train_ppo.py", "--reward mixed --score_norm running --kl_control adaptive --steps 30 --rollout_prompts 8 --eval_rows 8 "
            "--eval_every 5 --learning_rate 1e-3", 20),
    "ppo, LoRA": ("train_ppo.py", "--steps 30 --rollout_prompts 8 --eval_rows 8 --eval_every 5 --lora_rank 2", 20),
}  # fmt: skip


def flags_of(toy, name):
    script, flags, longest = STAGES[name]
    source = {"train_sft.py": [*toy.data, "--model", toy.base], "train_rm.py": ["--policy", toy.sft],
              "train_ppo.py": ["--policy", toy.sft, "--label_rm", toy.label_rm]}[script]  # fmt: skip
    source += ["--rationale_rm", toy.rationale_rm] if "mixed" in flags else []
    return script, [*source, *flags.split(), *SHORT.split()], longest


def once(name, toy, root, rng, whole, rows, failures):
    """One run of a stage, killed several times, against the undisturbed one; counted in `rows`."""
    script, flags, longest = flags_of(toy, name)
    if name not in whole:
        whole[name] = root / f"whole-{name}"
        if start(script, [*flags, "--output_dir", whole[name]], root / "whole.log").wait():
            raise SystemExit((root / "whole.log").read_text()[-2000:])
    number = sum(row["runs"] for row in rows.values())
    directory, log = root / f"run-{number}", root / f"run-{number}.log"
    moments = run_until_done(script, flags, directory, log, rng, KILLS_PER_RUN, longest)
    found, text = differences(whole[name], directory), log.read_text()
    rows[name].update(
        runs=1, kills=len(moments), writing=moments.count("writing"), resumed=text.count("resumed from"),
        damaged=text.count("is damaged"), differ=int(bool(found)),
    )  # fmt: skip
    failures += [f"{name}, {directory}: {found[:5]}"] if found else []
    print(name, dict(rows[name]), *failures[-1:], flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="in all")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which runs are killed")
    args = parser.parse_args()
    toy, root, rng, began = (
        toy_runs(),
        Path(tempfile.mkdtemp(prefix="rllr-soak-")),
        random.Random(args.seed),
        time.monotonic(),
    )
    whole, rows, failures = {}, {name: Counter() for name in STAGES}, []
    try:
        while sum(row["kills"] for row in rows.values()) < args.kills:
            once(min(STAGES, key=lambda name: rows[name]["kills"]), toy, root, rng, whole, rows, failures)
    except KeyboardInterrupt:
        print("stopped early", flush=True)
    columns = ("runs", "kills", "writing", "resumed", "damaged", "differ")
    lines = [
        f"{sum(row['kills'] for row in rows.values())} kills, seed {args.seed}, {time.monotonic() - began:.0f} s. Writing: killed while a "
        "checkpoint was being written. Resumed: from a checkpoint, the others died before their first one and began again. Damaged: "
        "checkpoints seen to be torn. Differ: runs that did not end in the very weights and metrics of the undisturbed one.",
        "",
        "| stage | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
        *(f"| {name} | " + " | ".join(str(row[column]) for column in columns) + " |" for name, row in rows.items()),
    ]
    write_result(
        "soak",
        "SIGKILL at random moments",
        lines,
        {"seed": args.seed, "failures": failures} | {n: dict(r) for n, r in rows.items()},
    )
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
