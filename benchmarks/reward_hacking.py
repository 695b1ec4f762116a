"""Reward hacking by kind of label pair: what best-of-n foretells, and what PPO then does.

    python benchmarks/reward_hacking.py --sft runs/demo/sft     # trains, writes the figures' data, draws
    python benchmarks/reward_hacking.py --figure                # draws docs/reward-hacking.svg from the stored data

For each kind of `--label_pairs` a reward model and a PPO run that looks at dev every 20 updates; all else is equal.
Finished stages do not run again. Writes benchmarks/results/reward-hacking.json; the drawing needs matplotlib.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from common import ROOT, machine

KINDS = {"paper": "paper's pairs", "drawn": "drawn rationales", "on_policy": "on-policy pairs"}
RESULTS, FIGURE = ROOT / "benchmarks" / "results" / "reward-hacking.json", ROOT / "docs" / "reward-hacking.svg"
COLOURS = {"paper": "#d55e00", "drawn": "#e69f00", "on_policy": "#0072b2"}  # Okabe and Ito, for every kind of eye


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sft", default="runs/demo/sft")
    parser.add_argument("--runs", default="runs/reward-hacking")
    parser.add_argument("--rm", default="--pairs_per_row 2 --epochs 6 --patience 9 --checks_per_epoch 1 --dropout 0.1")
    parser.add_argument("--ppo", default="--steps 120 --eval_every 20 --eval_rows 1000 --learning_rate 3e-4 "
                        "--value_learning_rate 1e-3 --ppo_epochs 2 --on_hacking ignore")  # fmt: skip
    parser.add_argument("--figure", action="store_true", help="draw from the stored figures alone")
    args = parser.parse_args()
    if not args.figure:
        runs = {kind: measure(kind, args) for kind in KINDS}
        result = {"kinds": runs, "sft": args.sft, "rm": args.rm, "ppo": args.ppo, "machine": machine()}
        RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(json.loads(RESULTS.read_text(encoding="utf-8")))


def measure(kind, args):
    """The reward model's report and PPO's dev accuracy by step, of one kind of pairs."""
    rm, ppo = Path(args.runs) / f"rm-{kind}", Path(args.runs) / f"ppo-{kind}"
    stage(rm, ["train_rm.py", "--policy", args.sft, "--label_pairs", kind, *args.rm.split()])
    stage(ppo, ["train_ppo.py", "--policy", args.sft, "--label_rm", str(rm), *args.ppo.split()])
    lines = [json.loads(line) for line in (ppo / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    looks = [
        {"step": line["step"], "accuracy": line["eval/accuracy"], "grounded": line.get("eval/grounded")}
        for line in lines if "eval/accuracy" in line
    ]  # fmt: skip
    scores = [line["judge/score"] for line in lines if "judge/score" in line]
    report = json.loads((rm / "rllr.json").read_text(encoding="utf-8"))["report"]
    return {"report": report, "ppo": looks, "scores": scores}


def stage(directory, command):
    """Run a script into a directory unless it has finished there."""
    done = directory.parent / f"{directory.name}.done"
    if done.exists():
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(ROOT / command[0]), *command[1:], "--output_dir", str(directory), "--overwrite"]
    with open(directory.parent / f"{directory.name}.log", "w", encoding="utf-8") as log:
        if subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode:
            sys.exit(f"{directory}: failed, see {log.name}; finished stages will not run again")
    done.touch()


def draw(result):
    """Left: best-of-n beside greedy; right: PPO's dev accuracy by update. One line per kind of pairs."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.hashsalt": "rllr", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.2), sharey=True, layout="constrained")
    for kind, label in KINDS.items():
        run, style = result["kinds"][kind], {"color": COLOURS[kind], "marker": "o", "markersize": 3.5}
        curve, looks = run["report"]["preview"]["curve"], run["ppo"]
        left.plot([p["n"] for p in curve], [100 * p["accuracy"] for p in curve], **style)
        right.plot([p["step"] for p in looks], [100 * p["accuracy"] for p in looks], label=label, **style)
    greedy = 100 * result["kinds"]["on_policy"]["report"]["preview"]["greedy"]
    left.axhline(greedy, color="#666666", linewidth=0.9, linestyle="--")
    left.annotate("greedy answer", (1, greedy), xytext=(0, 3), textcoords="offset points", fontsize=8, color="#666666")
    left.set_xscale("log", base=2, subs=[])
    ns = [p["n"] for p in curve]
    left.set_xticks(ns, [str(n) for n in ns])
    left.set(xlabel="n sampled answers, the best-scored one is taken", ylabel="right on dev (%)", title="Foretold")
    right.set(xlabel="PPO updates", title="What PPO did")
    right.legend(frameon=False, loc="best")
    figure.savefig(FIGURE, metadata={"Date": None})
    print(f"drawn {FIGURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
