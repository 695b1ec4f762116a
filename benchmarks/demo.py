"""`make demo` over seeds: what it hands back on test rows. Beside it: the same PPO with the mixed reward, an SFT that
trains as long as all three stages, and one that learns the labels of all labelled rows without explaining them.

    python benchmarks/demo.py --seeds 0 1 2 --threads 1        # appends a line a seed to results/demo.jsonl
    python benchmarks/demo.py --tables                         # writes results/demo.md, made of those lines alone

The commands are those of the Makefile, each with --seed. Runs and logs lie below --runs; a stage that has finished does
not run again. Settings are chosen on dev (--tune), with seeds from 100 on; a seed below 100 chooses nothing.
"""

import argparse
import json
import re
import shlex
import sys
from pathlib import Path

from stages import FIRST_TUNING_SEED, ROOT, Stages, longer_sft, machine, read

RESULTS = ROOT / "benchmarks" / "results"
CODE = ["rllr", "train_sft.py", "train_rm.py", "train_ppo.py", "Makefile", "benchmarks/demo.py", "benchmarks/stages.py"]
STAGES = ("sft", "rm-label", "ppo-label")
LABEL_EPOCHS = 12  # over all labelled rows: half as many row passes again as SFT makes over those with a rationale
NAMES = {
    "sft": "SFT",
    "sft-long": "SFT as long as all stages",
    "sft-label": "SFT, labels alone",
    "ppo-label": "RLLR, handed back",
    "ppo-label/last": "RLLR, last",
    "ppo-mixed": "RLLR-mixed with the grounded rule, handed back",
    "ppo-mixed/last": "RLLR-mixed with the grounded rule, last",
    "sft/best-of": "best-of-8 of SFT",
    "ppo-label/best-of": "best-of-8 of RLLR, handed back",
    "ppo-mixed/best-of": "best-of-8 of RLLR-mixed, handed back",
}
BEST_OF = 8
MIXED = ["--reward", "mixed", "--rationale_rm", "grounded"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", default="runs/demo-seeds")
    parser.add_argument("--tune", action="store_true", help="figures of dev, for seeds from 100 on; nothing is kept")
    parser.add_argument("--stages_alone", action="store_true", help="without the two SFTs they are compared with")
    parser.add_argument("--mixed", action="store_true", help="PPO with the mixed reward, too")
    parser.add_argument("--best_of", action="store_true", help="the best of 8 answers of each policy, too")
    parser.add_argument("--tables", action="store_true")
    args = parser.parse_args()
    if any((seed >= FIRST_TUNING_SEED) != args.tune for seed in args.seeds):
        sys.exit(f"--tune is for seeds from {FIRST_TUNING_SEED} on, and they are for nothing else")
    for seed in args.seeds:
        line = run_seed(args, seed, Path(args.runs).resolve() / f"{seed}-{args.threads}")
        print(json.dumps(line))
        if not args.tune:
            with open(RESULTS / "demo.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
    if args.tables:
        (RESULTS / "demo.md").write_text(tables())


def recipe():
    """{script: flags} of the Makefile's demo, without --overwrite."""
    lines = (ROOT / "Makefile").read_text().partition("\ndemo:")[2].partition("\n\n")[0].splitlines()
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("\t")]
    return {words[0]: [word for word in words[1:] if word != "--overwrite"] for words in commands}


def run_seed(args, seed, directory):
    """Run one seed's stages and what they are compared with; its line of demo.jsonl."""
    stages, flags = Stages(directory.parent, CODE, args.threads), recipe()

    def script(name, script, *words):
        stages.stage(directory / name, ROOT / script, *flags[script], *words, "--seed", seed)

    policy, label_rm = ["--policy", directory / "sft"], ["--label_rm", directory / "rm-label"]
    script("sft", "train_sft.py")
    script("rm-label", "train_rm.py", *policy)
    script("ppo-label", "train_ppo.py", *policy, *label_rm)
    if args.mixed:
        script("ppo-mixed", "train_ppo.py", *policy, *label_rm, *MIXED)
    log = (directory / "sft.log").read_text(encoding="utf-8")
    warm_up = sum(float(found) for found in re.findall(r"nats per token +(\d+) s", log))  # of the tiny model
    took = stages.stages["sft"]
    start = took["cpu_seconds"] * warm_up / took["seconds"]
    others = {
        "sft-long": longer_sft(flags["train_sft.py"], stages, start=start),
        "sft-label": ["--answer_format", "label", "--epochs", LABEL_EPOCHS],
    }
    others = {} if args.stages_alone else others
    for name, more in others.items():
        script(name, "train_sft.py", "--model", directory / "sft" / "base", *more)
    part = ["--part", "eval" if args.tune else "test"]
    there = [name for name in NAMES if name in others or name.split("/")[0] in stages.stages]
    names = [name for name in there if not name.endswith("/best-of")]
    stages.stage(
        directory / "evaluation", "-m", "rllr.evaluate", *part, "--models", *(directory / name for name in names)
    )
    found = read(directory / "evaluation" / "evaluate.json")
    if args.best_of:
        chosen = [name.split("/")[0] for name in there if name.endswith("/best-of")]
        best = ["--best_of", BEST_OF, *label_rm, "--models", *(directory / name for name in chosen)]
        stages.stage(directory / "evaluation-best-of", "-m", "rllr.evaluate", *part, *best)
        names += [f"{name}/best-of" for name in chosen]
        found += read(directory / "evaluation-best-of" / "evaluate.json")[1::2]  # each greedy row is before its best
    return {
        "seed": seed,
        "threads": args.threads,
        "methods": {name: {k: v for k, v in row.items() if k != "model"} for name, row in zip(names, found)},
        "preview": read(directory / "rm-label" / "rllr.json")["report"]["preview"],
        "seconds": {name: took["seconds"] for name, took in stages.stages.items()},
        "sft-long epochs": others["sft-long"][1] if others else None,
        "commit": stages.commits(),
        "machine": machine(args.threads),
    }


def cell(method):
    """Accuracy and, of answers with a rationale, how many are grounded."""
    if method is None:
        return ""
    return f"{100 * method['accuracy']:.1f}" + (f" ({100 * method['grounded']:.0f})" if "grounded" in method else "")


def tables():
    """The Markdown page of all lines."""
    lines = [json.loads(line) for line in (RESULTS / "demo.jsonl").read_text().splitlines()]
    lines.sort(key=lambda line: (line["threads"], line["seed"]))
    page = ["# `make demo` over seeds", ""]
    page += ["Accuracy in % on 2,000 test rows that chose nothing; grounded in brackets.", ""]
    page += ["| seed | threads | transformers | " + " | ".join(NAMES.values()) + " | handed back − SFT | seconds |"]
    page += ["|---" * (len(NAMES) + 5) + "|"]
    for line in lines:
        cells = [cell(line["methods"].get(name)) for name in NAMES]
        gain = line["methods"]["ppo-label"]
        low, high = (100 * bound for bound in gain["difference_interval"])
        cells += [f"{100 * gain['difference']:+.1f} ({low:+.1f} .. {high:+.1f})"]
        stages = sum(line["seconds"][stage] for stage in STAGES)
        version = line["machine"]["versions"]["transformers"]
        page += [f"| {line['seed']} | {line['threads']} | {version} | " + " | ".join(cells) + f" | {stages:.0f} |"]
    page += ["", "| gain over SFT | threads | mean | worst | runs |", "|---|---|---|---|---|"]
    own = {(line["seed"], line["threads"]): line for line in reversed(lines)}.values()  # each once: its first run
    for threads in sorted({line["threads"] for line in own}):
        for name in list(NAMES)[1:]:
            runs = [line["methods"] for line in own if line["threads"] == threads and name in line["methods"]]
            gains = [100 * methods[name]["difference"] for methods in runs]
            if gains:
                mean = sum(gains) / len(gains)
                page += [f"| {NAMES[name]} | {threads} | {mean:+.1f} | {min(gains):+.1f} | {len(gains)} |"]
    made = sorted({f"commit {line['commit']}, {json.dumps(line['machine'])}" for line in lines})
    return "\n".join([*page, "", "    python benchmarks/demo.py --seeds ... --threads ...", "", *made, ""])


if __name__ == "__main__":
    main()
