"""Reward hacking by kind of label pair: what best-of-n foretells, and what PPO then does.

    python benchmarks/reward_hacking.py --sft runs/demo/sft     # trains, writes the figures' data, draws
    python benchmarks/reward_hacking.py --figure                # draws docs/reward-hacking.svg from the stored data

For each kind of `--label_pairs` a reward model and a PPO run with the settings of `make demo`; it looks at dev every 10
rollouts and is never stopped. All else is equal. Finished stages do not run again. Writes
benchmarks/results/reward-hacking.json; the drawing needs matplotlib.
"""

import argparse
import json
from pathlib import Path

from demo import CODE, recipe
from stages import ROOT, Stages, machine, read

KINDS = {"paper": "paper's pairs", "drawn": "drawn rationales", "on_policy": "on-policy pairs"}
RESULTS, FIGURE = ROOT / "benchmarks" / "results" / "reward-hacking.json", ROOT / "docs" / "reward-hacking.svg"
COLOURS = {"paper": "#d55e00", "drawn": "#e69f00", "on_policy": "#0072b2"}  # Okabe and Ito, for every kind of eye


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sft", default="runs/demo/sft")
    parser.add_argument("--runs", default="runs/reward-hacking")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", action="store_true", help="draw from the stored figures alone")
    args = parser.parse_args()
    if not args.figure:
        stages = Stages(Path(args.runs).resolve(), CODE)
        runs = {kind: measure(kind, stages, args) for kind in KINDS}
        result = {"kinds": runs, "stages": stages.stages, "commit": stages.commits(), "machine": machine()}
        RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(read(RESULTS))


def measure(kind, stages, args):
    """The reward model's report and PPO's dev accuracy by step, of one kind of pairs."""
    flags, rm, ppo = recipe(), stages.runs / f"rm-{kind}", stages.runs / f"ppo-{kind}"
    common = ["--policy", args.sft, "--seed", args.seed]
    stages.stage(rm, ROOT / "train_rm.py", *flags["train_rm.py"], *common, "--label_pairs", kind)
    more = ["--label_rm", rm, "--eval_every", 10, "--on_hacking", "ignore"]
    stages.stage(ppo, ROOT / "train_ppo.py", *flags["train_ppo.py"], *common, *more)
    lines = [json.loads(line) for line in (ppo / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    looks = [
        {"step": line["step"], "accuracy": line["eval/accuracy"], "grounded": line.get("eval/grounded")}
        for line in lines if "eval/accuracy" in line
    ]  # fmt: skip
    scores = [line["judge/score"] for line in lines if "judge/score" in line]
    return {"report": read(rm / "rllr.json")["report"], "ppo": looks, "scores": scores}


def draw(result):
    """Left: best-of-n beside greedy; right: PPO's dev accuracy by rollout. One line per kind of pairs."""
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
    near = {"xytext": (0, 3), "textcoords": "offset points", "ha": "right", "fontsize": 8, "color": "#666666"}
    left.annotate("greedy answer", (curve[-1]["n"], greedy), **near)
    left.set_xscale("log", base=2, subs=[])
    ns = [p["n"] for p in curve]
    left.set_xticks(ns, [str(n) for n in ns])
    left.set(xlabel="n sampled answers, the best-scored one is taken", ylabel="right on dev (%)", title="Foretold")
    right.set(xlabel="PPO rollouts", title="What PPO did")
    right.legend(frameon=False, loc="best")
    figure.savefig(FIGURE, metadata={"Date": None})
    print(f"drawn {FIGURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
