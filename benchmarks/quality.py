"""Does the label-sensitive reward help? The whole path on one task, several seeds, every method, one table.

    python benchmarks/quality.py --task demo --seeds 1 2 3
    python benchmarks/quality.py --task sst2 --train_file train.jsonl --dev_file dev.jsonl --labelled 4000 --seeds 0 1 2

The dev file is halved by a hash of the row id: one half chooses epochs and checkpoints while training, the other is only
reported. (The demo has a test part of its own.) A finished stage is not run again, so an interrupted benchmark goes on.
Writes <output>/<task>.md and <task>.json with commands, versions and hardware.
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
    parser.add_argument("--runs", default="runs/quality", help="where the models go")
    parser.add_argument("--output", default="benchmarks/results", help="where the table goes")
    parser.add_argument("--workers", type=int, default=2, help="seeds side by side, one thread each")
    parser.add_argument("--model", default="tiny", help="tiny, or a model directory or hub name")
    parser.add_argument("--tiny", default="", help="further flags of python -m rllr.tiny")
    parser.add_argument("--sft", default="", help="further flags of train_sft.py")
    parser.add_argument("--rm", default="", help="further flags of train_rm.py")
    parser.add_argument("--ppo", default="", help="further flags of train_ppo.py")
    parser.add_argument("--methods", nargs="+", default=["rationale", "label", "mixed", "gold"], help="rewards for PPO")
    parser.add_argument("--no_label_only", action="store_true")
    args = parser.parse_args()
    runs = Path(args.runs) / args.task
    runs.mkdir(parents=True, exist_ok=True)
    data = []
    if args.train_file:
        choose, report = halve(Path(args.dev_file), runs)
        data = ["--train_file", args.train_file, "--eval_file", str(choose)]
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
            pool.shutdown(wait=False, cancel_futures=True)  # the seeds that have not begun
            raise
    for seed in args.seeds:
        evaluate(args, runs / f"seed{seed}", report if args.train_file else None)
    write_table(args, runs)


def halve(dev_file, runs):
    """(file that chooses, file that is reported): rows by the parity of a hash of their id."""
    parts = runs / "dev_choose.jsonl", runs / "dev_report.jsonl"
    lines = [line for line in dev_file.read_text(encoding="utf-8").splitlines() if line.strip()]
    for part, path in enumerate(parts):
        kept = [line for line in lines if hashlib.sha256(json.loads(line)["id"].encode()).digest()[0] % 2 == part]
        path.write_text("\n".join(kept) + "\n", encoding="utf-8")
    return parts


def stage(directory, command, threads=1):
    """Run a stage unless it is finished; its command, wall time and log stay in the directory's parent."""
    mark = directory.parent / f"{directory.name}.done.json"
    if mark.exists():
        return
    command = [sys.executable, *command, "--output_dir", str(directory), "--overwrite"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    start = time.monotonic()
    directory.parent.mkdir(parents=True, exist_ok=True)
    with open(directory.parent / f"{directory.name}.log", "w") as log:
        if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode:
            sys.exit(f"{directory}: failed, see {log.name}; a finished stage is not run again")
    shown = [Path(part).name if Path(part).is_absolute() else part for part in command[1:]]
    mark.write_text(
        json.dumps({"command": " ".join(["python", *shown]), "seconds": round(time.monotonic() - start, 1)})
    )


def one_seed(args, directory, seed, data, base):
    script = lambda name: str(ROOT / name)  # noqa: E731
    common = ["--seed", str(seed)]
    sft = [
        script("train_sft.py"),
        "--model",
        base,
        "--task",
        args.task,
        *data,
        "--labelled",
        str(args.labelled),
        *common,
    ]
    if not args.no_label_only:
        stage(directory / "sft-label-only", [*sft, "--answer_format", "label", *args.sft.split()])
    stage(directory / "sft", [*sft, *args.sft.split()])
    policy = ["--policy", str(directory / "sft"), *common]
    for pairs in ("label", "rationale"):
        if pairs == "label" or {"rationale", "mixed"} & set(args.methods):
            stage(directory / f"rm-{pairs}", [script("train_rm.py"), "--pairs", pairs, *policy, *args.rm.split()])
    models = ["--label_rm", str(directory / "rm-label")]
    rationale = ["--rationale_rm", str(directory / "rm-rationale")]
    for reward in args.methods:
        own = {"label": models, "rationale": rationale, "mixed": models + rationale, "gold": []}[reward]
        if reward == "gold":  # the value model starts as RLLR's does, so that only the reward differs
            own = ["--value_init", str(directory / "rm-label")]
        stage(
            directory / f"ppo-{reward}", [script("train_ppo.py"), "--reward", reward, *policy, *own, *args.ppo.split()]
        )


def evaluate(args, directory, report):
    models = [str(directory / place) for place in METHODS.values() if (directory / place).is_dir()]
    command = ["-m", "rllr.evaluate", "--models", *models]
    command += ["--task", args.task] + (["--eval_file", str(report)] if report else ["--part", "test"])
    stage(directory / "evaluation", list(command))


def write_table(args, runs):
    """Means over seeds, and differences to SFT with rationale: bootstrap over rows (the same rows in every seed)."""
    right, failures = {}, {}  # method -> [seeds, rows]
    for seed in args.seeds:
        directory = runs / f"seed{seed}"
        present = [name for name, place in METHODS.items() if (directory / place).is_dir()]
        for n, name in enumerate(present):
            rows = [
                json.loads(line) for line in (directory / "evaluation" / f"answers-{n}.jsonl").open(encoding="utf-8")
            ]
            right.setdefault(name, []).append([row["label"] == row["gold"] for row in rows])
            failures.setdefault(name, []).append(np.mean([row["label"] is None for row in rows]))
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
    reward_models = {
        seed: {kind: read(runs / f"seed{seed}" / f"rm-{kind}" / "rllr.json") for kind in ("label", "rationale")}
        for seed in args.seeds
    }
    seconds = {
        mark.name.removesuffix(".done.json"): json.loads(mark.read_text())["seconds"]
        for mark in sorted((runs / f"seed{args.seeds[0]}").glob("*.done.json"))
    }
    commands = {
        mark.name.removesuffix(".done.json"): json.loads(mark.read_text())["command"]
        for mark in sorted((runs / f"seed{args.seeds[0]}").glob("*.done.json"))
    }
    result = {
        "task": args.task, "labelled": args.labelled, "seeds": args.seeds, "rows": base.shape[1], "table": table,
        "reward_models": reward_models, "seconds": seconds, "commands": commands, "machine": machine(),
        "command": " ".join(["python", *[Path(a).name if Path(a).is_absolute() else a for a in sys.argv]]),
    }  # fmt: skip
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / f"quality-{args.task}.json").write_text(json.dumps(result, indent=2, default=float) + "\n")
    text = markdown(result)
    (output / f"quality-{args.task}.md").write_text(text)
    print(text)


def read(record):
    return json.loads(record.read_text())["report"] if record.is_file() else None


def machine():
    import torch
    import transformers

    name = next(
        (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"


def markdown(result):
    lines = [
        f"# {result['task']}: {result['labelled']} labelled rows, seeds {', '.join(map(str, result['seeds']))}", "",
        f"Accuracy in %, greedy answers, {result['rows']} rows that chose nothing. Difference to \"{BASE}\" in points,",
        "paired, 95 % interval by bootstrap over rows (the seeds' mean).", "",
        "| method | " + " | ".join(f"seed {seed}" for seed in result["seeds"]) + " | mean | difference (95 % interval) | parse failures |",
        "|---" * (len(result["seeds"]) + 4) + "|",
    ]  # fmt: skip
    for row in result["table"]:
        seeds = " | ".join(f"{100 * value:.1f}" for value in row["seeds"])
        difference = (
            ""
            if "difference" not in row
            else (
                f"{100 * row['difference']:+.2f} ({100 * row['interval'][0]:+.2f} .. {100 * row['interval'][1]:+.2f})"
            )
        )
        lines.append(
            f"| {row['method']} | {seeds} | {100 * row['accuracy']:.1f} | {difference} | {100 * row['parse_failures']:.1f} % |"
        )
    lines += [
        "",
        "Reward models on held-out pairs, and the label reward model as a classifier beside the SFT policy:",
        "",
    ]
    lines += [
        "| seed | label pairs | rationale pairs | as a classifier, dev half that chooses | SFT policy there |",
        "|---|---|---|---|---|",
    ]
    for seed, models in result["reward_models"].items():
        share = lambda model: f"{100 * model['pairs']['all']['accuracy']:.1f}" if model else ""  # noqa: E731
        judged = (models["label"] or {}).get("classifier", {}).get("eval", {})
        lines.append(
            f"| {seed} | {share(models['label'])} | {share(models['rationale'])} | {100 * judged.get('reward_model', 0):.1f} "
            f"| {100 * judged.get('policy', 0):.1f} |"
        )
    lines += [
        "",
        "Wall time in seconds, one thread, first seed: "
        + ", ".join(f"{k} {v:.0f}" for k, v in result["seconds"].items()),
    ]
    lines += ["", f"    {result['command']}", "", "Stages of the first seed:", ""]
    lines += [f"    {command}" for command in result["commands"].values()] + ["", result["machine"], ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
