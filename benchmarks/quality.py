"""Does the label-sensitive reward help? All stages on one task, with several seeds and all methods, in one table.

    python benchmarks/quality.py --task demo --seeds 1 2 3
    python benchmarks/quality.py --task sst2 --train_file train.jsonl --dev_file dev.jsonl --labelled 4000 --seeds 0 1 2

A hash of the row id halves the dev file: one half chooses epochs and checkpoints during training, the other is only
reported. (The demo has its own test split.) Finished stages do not run again, so an interrupted benchmark can continue.
Writes <output>/quality-<task>.md and quality-<task>.json with commands, versions and hardware.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
METHODS = {  # name in the table: directory of the policy
    "SFT, label only": "sft-label-only",
    "SFT with rationale": "sft",
    "RLHF (rationale reward)": "ppo-rationale/last",
    "RLLR": "ppo-label/last",
    "RLLR-mixed": "ppo-mixed/last",
    "gold reward (upper bound)": "ppo-gold/last",
}
BASE = "SFT with rationale"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True)
    parser.add_argument("--train_file")
    parser.add_argument("--dev_file")
    parser.add_argument("--labelled", type=int, default=4000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", default="runs/quality", help="directory for the models")
    parser.add_argument("--output", default="benchmarks/results", help="directory for the table")
    parser.add_argument("--workers", type=int, default=2, help="number of seeds in parallel, one thread each")
    parser.add_argument("--model", default="tiny", help="tiny, or a model directory or hub name")
    parser.add_argument("--tiny", default="", help="further flags of python -m rllr.tiny")
    parser.add_argument("--sft", default="", help="further flags of train_sft.py")
    parser.add_argument("--rm", default="", help="further flags of train_rm.py")
    parser.add_argument("--ppo", default="", help="further flags of train_ppo.py")
    parser.add_argument("--methods", nargs="+", default=["rationale", "label", "mixed", "gold"], help="PPO rewards")
    parser.add_argument("--no_label_only", action="store_true")
    args = parser.parse_args()
    runs = Path(args.runs) / args.task
    runs.mkdir(parents=True, exist_ok=True)
    data = []
    if args.train_file:
        choose, report = halve(Path(args.dev_file), runs)
        data = ["--train_file", args.train_file, "--eval_file", str(choose), "--test_file", str(report)]
    base = args.model
    if base == "tiny":
        base = str(runs / "tiny")
        stage(runs / "tiny", ["-m", "rllr.tiny", "--task", args.task, *data, *args.tiny.split()])
    with ThreadPoolExecutor(args.workers) as pool:
        jobs = [pool.submit(one_seed, args, runs / f"seed{seed}", seed, data, base) for seed in args.seeds]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # seeds that have not started
            raise
    for seed in args.seeds:
        evaluate(args, runs / f"seed{seed}", report if args.train_file else None)
    write_table(args, runs)


def halve(dev_file, runs):
    """(file for choosing, file for reporting): the parity of a hash of the id divides the rows."""
    parts = runs / "dev_choose.jsonl", runs / "dev_report.jsonl"
    lines = [line for line in dev_file.read_text(encoding="utf-8").splitlines() if line.strip()]
    for part, path in enumerate(parts):
        kept = [line for line in lines if hashlib.sha256(json.loads(line)["id"].encode()).digest()[0] % 2 == part]
        path.write_text("\n".join(kept) + "\n", encoding="utf-8")
    return parts


def stage(directory, command, threads=1):
    """Run a stage unless it is finished. Its command, wall time and log are in the parent directory."""
    mark = directory.parent / f"{directory.name}.done.json"
    if mark.exists():
        return
    command = [sys.executable, *command, "--output_dir", str(directory), "--overwrite"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    start = time.monotonic()
    directory.parent.mkdir(parents=True, exist_ok=True)
    with open(directory.parent / f"{directory.name}.log", "w") as log:
        if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode:
            sys.exit(f"{directory}: failed, see {log.name}; finished stages will not run again")
    seconds = round(time.monotonic() - start, 1)
    mark.write_text(json.dumps({"command": as_typed(command[1:]), "seconds": seconds}))


def as_typed(words):
    """A command line with file names in place of absolute paths."""
    return " ".join(["python", *[Path(word).name if Path(word).is_absolute() else word for word in words]])


def one_seed(args, directory, seed, data, base):
    """All training stages of one seed."""
    train_sft, train_rm, train_ppo = (str(ROOT / name) for name in ("train_sft.py", "train_rm.py", "train_ppo.py"))
    common = ["--seed", str(seed)]
    sft = [train_sft, "--model", base, "--task", args.task, *data, "--labelled", str(args.labelled), *common]
    if not args.no_label_only:
        stage(directory / "sft-label-only", [*sft, "--answer_format", "label", *args.sft.split()])
    stage(directory / "sft", [*sft, *args.sft.split()])
    policy = ["--policy", str(directory / "sft"), *common]
    for pairs in ("label", "rationale"):
        if pairs == "label" or {"rationale", "mixed"} & set(args.methods):
            stage(directory / f"rm-{pairs}", [train_rm, "--pairs", pairs, *policy, *args.rm.split()])
    models = ["--label_rm", str(directory / "rm-label")]
    rationale = ["--rationale_rm", str(directory / "rm-rationale")]
    for reward in args.methods:
        own = {"label": models, "rationale": rationale, "mixed": models + rationale, "gold": []}[reward]
        if reward == "gold":  # the value model starts as in RLLR, so that only the reward differs
            own = ["--value_init", str(directory / "rm-label")]
        stage(directory / f"ppo-{reward}", [train_ppo, "--reward", reward, *policy, *own, *args.ppo.split()])


def evaluate(args, directory, report):
    """Evaluate all policies of one seed on the rows of the file `report`, or on the test split."""
    models = [str(directory / place) for place in METHODS.values() if (directory / place).is_dir()]
    command = ["-m", "rllr.evaluate", "--models", *models]
    command += ["--task", args.task] + (["--eval_file", str(report)] if report else ["--part", "test"])
    stage(directory / "evaluation", list(command))


def read_answers(args, runs):
    """(right, failures): {method: [seeds, rows] of right answers}, {method: shares of parse failures by seed}."""
    right, failures = {}, {}
    for seed in args.seeds:
        directory = runs / f"seed{seed}"
        present = [name for name, place in METHODS.items() if (directory / place).is_dir()]
        for n, name in enumerate(present):
            answers = directory / "evaluation" / f"answers-{n}.jsonl"
            rows = [json.loads(line) for line in answers.open(encoding="utf-8")]
            right.setdefault(name, []).append([row["label"] == row["gold"] for row in rows])
            failures.setdefault(name, []).append(np.mean([row["label"] is None for row in rows]))
    return right, failures


def compare(right, failures):
    """Rows of the table: means over seeds, and differences to SFT with rationale with bootstrap intervals.

    The bootstrap draws rows; all seeds have the same rows.
    """
    rng = np.random.default_rng(0)
    base, table = np.array(right[BASE], float), []
    drawn = rng.integers(0, base.shape[1], (4000, base.shape[1]))
    for name, values in right.items():
        values = np.array(values, float)
        row = {
            "method": name,
            "accuracy": values.mean(),
            "seeds": values.mean(1).tolist(),
            "parse_failures": float(np.mean(failures[name])),
        }
        if name != BASE:
            difference = (values - base).mean(0)
            low, high = np.percentile(difference[drawn].mean(1), [2.5, 97.5])
            row |= {"difference": difference.mean(), "interval": [low, high]}
        table.append(row)
    return table


def write_table(args, runs):
    """Write the results of all seeds as Markdown and JSON."""
    right, failures = read_answers(args, runs)
    reward_models = {
        seed: {kind: read(runs / f"seed{seed}" / f"rm-{kind}" / "rllr.json") for kind in ("label", "rationale")}
        for seed in args.seeds
    }
    marks = sorted((runs / f"seed{args.seeds[0]}").glob("*.done.json"))
    stages = {mark.name.removesuffix(".done.json"): json.loads(mark.read_text()) for mark in marks}
    result = {
        "task": args.task,
        "labelled": args.labelled,
        "seeds": args.seeds,
        "rows": len(right[BASE][0]),
        "table": compare(right, failures),
        "reward_models": reward_models,
        "seconds": {name: done["seconds"] for name, done in stages.items()},
        "commands": {name: done["command"] for name, done in stages.items()},
        "machine": machine(),
        "command": as_typed(sys.argv),
    }
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / f"quality-{args.task}.json").write_text(json.dumps(result, indent=2, default=float) + "\n")
    text = markdown(result)
    (output / f"quality-{args.task}.md").write_text(text)
    print(text)


def read(record):
    """The report in a reward model's record; None without a record."""
    return json.loads(record.read_text())["report"] if record.is_file() else None


def machine():
    import torch
    import transformers

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{next(names, platform.machine())}, {os.cpu_count()} cores, {versions}"


def markdown(result):
    """The results as Markdown."""
    seeds = [f"seed {seed}" for seed in result["seeds"]]
    lines = [
        f"# {result['task']}: {result['labelled']} labelled rows, seeds {', '.join(map(str, result['seeds']))}",
        "",
        f'Accuracy in %, greedy answers, {result["rows"]} rows that chose nothing. Difference to "{BASE}" in points,',
        "paired, 95 % interval by bootstrap over rows (the seeds' mean).",
        "",
        "| " + " | ".join(["method", *seeds, "mean", "difference (95 % interval)", "parse failures"]) + " |",
        "|---" * (len(seeds) + 4) + "|",
    ]
    for row in result["table"]:
        accuracies = [f"{100 * value:.1f}" for value in (*row["seeds"], row["accuracy"])]
        difference = ""
        if "difference" in row:
            low, high = row["interval"]
            difference = f"{100 * row['difference']:+.2f} ({100 * low:+.2f} .. {100 * high:+.2f})"
        cells = [row["method"], *accuracies, difference, f"{100 * row['parse_failures']:.1f} %"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "Reward models on held-out pairs, and the label reward model as a classifier beside the SFT policy:",
        "",
        "| seed | label pairs | rationale pairs | as a classifier, dev half that chooses | SFT policy there |",
        "|---|---|---|---|---|",
    ]
    for seed, models in result["reward_models"].items():
        judged = (models["label"] or {}).get("classifier", {}).get("eval", {})
        shares = [f"{100 * judged.get(name, 0):.1f}" for name in ("reward_model", "policy")]
        cells = [str(seed), pair_accuracy(models["label"]), pair_accuracy(models["rationale"]), *shares]
        lines.append("| " + " | ".join(cells) + " |")
    times = ", ".join(f"{name} {seconds:.0f}" for name, seconds in result["seconds"].items())
    lines += ["", f"Wall time in seconds, one thread, first seed: {times}"]
    lines += ["", f"    {result['command']}", "", "Stages of the first seed:", ""]
    lines += [f"    {command}" for command in result["commands"].values()] + ["", result["machine"], ""]
    return "\n".join(lines)


def pair_accuracy(report):
    """A reward model's accuracy on held-out pairs in %; "" without a report."""
    return f"{100 * report['pairs']['all']['accuracy']:.1f}" if report else ""


if __name__ == "__main__":
    main()
