"""Tables of the quality benchmark, made of its cells alone: benchmarks/results/quality.md.

    python benchmarks/quality_tables.py

Differences are to "SFT with rationale", in points of accuracy. Their 95 % intervals are percentile bootstrap intervals
(Efron and Tibshirani 1993, chapter 13) over texts and seeds. A text is drawn with all its rows: in every seed, and in
every task that has it (mr and sst2 share texts). The seeds of a task are drawn as well, where it has several.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from quality import CELLS, CODE, METHODS
from stages import commit_of

BASE = "sft"
RESAMPLES = 4000
RLLR, GOLD = "ppo-label", "ppo-gold"
GROUNDED = ("grounded", "grounded_right", "grounded_wrong")  # of all answers, the right and the wrong ones
HANDED_BACK = ("ppo-label/best", "ppo-mixed/best")  # what a user of RLLR is given
MISSED = 1.5  # points that the gold reward gained, from which a preview that promised nothing has missed a gain
WORST = -0.5  # no interval of what is handed back may lie below it, in points
SHARE = 0.8  # of what the gold reward gains: what RLLR should gain on average


# ---- figures ---------------------------------------------------------------------------------------------------------


def read_cells(directory):
    """The cells of a directory, by task and seed."""
    cells = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(directory).glob("*.json"))]
    return sorted(cells, key=lambda cell: (cell["model"], cell["all_labelled"], cell["task"], cell["seed"]))


def grouped(cells):
    """{(model, all_labelled): {task: its cells}}: each is a table of its own."""
    groups = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        own = groups[cell["model"], cell["all_labelled"]][cell["task"]]
        own.append(cell)
        if cell["texts"] != own[0]["texts"]:
            sys.exit(f"{name_of(cell)} and {name_of(own[0])} have other rows; run one of them again")
    return groups


def right(cell, method):
    """[R] booleans: which rows the method has right. A parse failure is wrong."""
    return np.array(
        [given == gold for given, gold in zip(cell["methods"][method]["labels"], cell["gold"], strict=True)]
    )


def differences(cells, method):
    """[S, R]: for each seed and row 1, 0 or -1, whether the method is right minus whether SFT with rationale is."""
    return np.array([right(cell, method).astype(float) - right(cell, BASE) for cell in cells])


def present(cells, methods=tuple(METHODS)):
    """The methods that all cells have."""
    return [name for name in methods if all(name in cell["methods"] for cell in cells)]


def drawn_differences(by_task, method, seed=0):
    """{task: [RESAMPLES] mean differences} of one method, drawn as the module says; the same draws for every method.

    by_task: {task: cells}; the cells of a task have the same rows.
    """
    rng, found = np.random.default_rng(seed), {}
    for tasks in sharing(by_task):
        texts = {task: by_task[task][0]["texts"].split() for task in tasks}
        known = {text: place for place, text in enumerate(sorted(set().union(*texts.values())))}
        counts = rng.multinomial(len(known), np.full(len(known), 1 / len(known)), RESAMPLES)  # [RESAMPLES, texts]
        for task in tasks:
            cells = by_task[task]
            weights = counts[:, [known[text] for text in texts[task]]]  # [RESAMPLES, R]
            seeds = rng.multinomial(len(cells), np.full(len(cells), 1 / len(cells)), RESAMPLES) / len(cells)
            by_row = seeds @ differences(cells, method)  # [RESAMPLES, R]: mean over the drawn seeds
            found[task] = (weights * by_row).sum(1) / weights.sum(1)
    return found


def sharing(by_task):
    """The tasks in groups, those together that have a text in common."""
    groups = []
    for task, cells in by_task.items():
        texts, own = set(cells[0]["texts"].split()), [task]
        for group in [group for group in groups if group[1] & texts]:
            groups.remove(group)
            own, texts = group[0] + own, group[1] | texts
        groups.append((own, texts))
    return [own for own, _ in groups]


def compare(by_task):
    """{method: {task or "mean": (accuracy, difference, low, high)}} in %, points; "mean" where all tasks have it."""
    table = {}
    for method in METHODS:
        tasks = {task: cells for task, cells in by_task.items() if method in present(cells)}
        drawn = drawn_differences(tasks, method) if tasks else {}
        row = {}
        for task, cells in tasks.items():
            accuracy = np.mean([right(cell, method).mean() for cell in cells])
            row[task] = (accuracy, differences(cells, method).mean(), *np.percentile(drawn[task], [2.5, 97.5]))
        if len(tasks) == len(by_task):
            means = np.mean([drawn[task] for task in tasks], axis=0)
            centre = np.mean([row[task][:2] for task in tasks], axis=0)
            row["mean"] = (*centre, *np.percentile(means, [2.5, 97.5]))
        if row:
            table[method] = {name: tuple(100 * float(value) for value in values) for name, values in row.items()}
    return table


def gain(cell, method):
    """Points of accuracy over SFT with rationale, in one cell."""
    return 100 * float(differences([cell], method).mean())


def promise(cell):
    """What the preview of a cell said, and what came.

    {"verdict", "predicted": best-of-8 minus greedy in points, "last", "best": what RLLR gained, "gold": what the gold
    reward gained (handed back; None: not tried), "false": a gain was promised and RLLR handed back none, "missed": no
    gain was promised, and the gold reward gained MISSED points or more}.
    """
    preview = cell["preview"]
    point = max((p for p in preview["curve"] if p["n"] <= 8), key=lambda p: p["n"])
    promised = preview["verdict"] == "gain"
    last, best = (gain(cell, name) for name in (f"{RLLR}/last", f"{RLLR}/best"))
    gold = gain(cell, f"{GOLD}/best") if f"{GOLD}/best" in cell["methods"] else None
    found = {"verdict": preview["verdict"], "predicted": 100 * point["difference"], "last": last, "best": best}
    missed = not promised and gold is not None and gold > MISSED - 1e-9
    return found | {"gold": gold, "false": promised and best <= 0, "missed": missed}


def correlation(x, y):
    """Pearson's; None where there are fewer than three points, or no spread."""
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


# ---- for people ------------------------------------------------------------------------------------------------------


def page(cells, commit):
    """The whole page as Markdown. commit: of today's code; cells of another one are marked with theirs."""
    lines = ["# Real tasks, every method", "", *intro(cells, commit)]
    for (model, all_labelled), by_task in grouped(cells).items():
        rows = "all rows labelled" if all_labelled else "few labelled rows"
        lines += ["", f"## Model {model}, {rows}", ""]
        table = compare(by_task)
        lines += [*summary(table, by_task), *reach(table), *grid(table, by_task), *beside(by_task)]
    return "\n".join([*lines, *promises(cells), *list_cells(cells, commit)]) + "\n"


def intro(cells, commit):
    machines = [(cell["machine"]["processor"], cell["machine"].get("card")) for cell in cells]
    processors = sorted({" and one ".join(filter(None, pair)) for pair in machines})
    versions = sorted({", ".join(f"{k} {v}" for k, v in cell["machine"]["versions"].items()) for cell in cells})
    parts = sorted({cell["part"] for cell in cells})
    return [
        f"Made by `python benchmarks/quality_tables.py` of the {len(cells)} files in cells/. One cell is a task, a",
        "model and a seed:",
        "",
        "    python benchmarks/quality.py --data data --task sst2 --seed 0",
        "",
        f"Accuracy of greedy answers in %, on {' and '.join(parts)} of dev, which chose nothing. Differences are to",
        f'"{METHODS[BASE]}", in points, with 95 % bootstrap intervals over texts and seeds; a text that two tasks',
        "share is drawn for both. *Handed back* is PPO's `best`, the start where no step beats it on dev; *last* is",
        f"the policy after the last step. The code is of commit {commit}; a cell of another one has that behind its",
        "name.",
        "",
        f"{'; '.join(processors)}; one thread; {'; '.join(versions)}.",
    ]


def summary(table, by_task):
    """A line a method: means over the tasks."""
    lines = [
        f"Means over {len(by_task)} tasks ({', '.join(by_task)}):",
        "",
        "| method | accuracy | difference (95 % interval) | worst task | macro F1, difference | no readable label |",
        "|---|---|---|---|---|---|",
    ]
    plain = mean_of(by_task, BASE, "macro_f1")
    for method, row in table.items():
        if "mean" in row:
            worst = min((task for task in row if task != "mean"), key=lambda task: row[task][1])
            tail = ["", ""] if method == BASE else [span(row["mean"]), f"{worst} {row[worst][1]:+.1f}"]
            by_class = mean_of(by_task, method, "macro_f1")
            beside_plain = f"{by_class:.1f}" + (f", {by_class - plain:+.2f}" if method != BASE else "")
            unread = f"{mean_of(by_task, method, 'parse_failures'):.1f} %"
            lines.append(markdown_row([METHODS[method], f"{row['mean'][0]:.1f}", *tail, beside_plain, unread]))
    return lines


def mean_of(by_task, method, name):
    """A figure of a method in %: the mean over the tasks of its mean over the seeds."""
    seeds = [np.mean([cell["methods"][method][name] for cell in cells]) for cells in by_task.values()]
    return 100 * float(np.mean(seeds))


def reach(table):
    """What the benchmark is to reach, and whether it does."""
    lines, below = [""], []
    for method in HANDED_BACK:
        below += [
            f"{METHODS[method]} on {task}" for task, row in table.get(method, {}).items()
            if task != "mean" and row[3] < WORST
        ]  # fmt: skip
    lines.append(
        f"Handed back by RLLR or RLLR-mixed with an interval that lies below {WORST}: {'; '.join(below) or 'nothing'}."
    )
    ours, gold = (table.get(f"{name}/best", {}).get("mean") for name in (RLLR, GOLD))
    if ours and gold:
        share = f"{100 * ours[1] / gold[1]:.0f} % of it" if gold[1] > 0 else "nothing to compare with"
        lines.append(
            f"On average RLLR gains {ours[1]:+.2f} and the gold reward {gold[1]:+.2f} points: {share} (at least "
            f"{100 * SHARE:.0f} % is the aim)."
        )
    return lines


def grid(table, by_task):
    """Differences by task."""
    lines = ["", "Differences by task:", "", markdown_row(["method", *by_task]), "|---" * (len(by_task) + 1) + "|"]
    for method, row in table.items():
        if method != BASE:
            lines.append(markdown_row([METHODS[method], *(span(row[t], 1) if t in row else "" for t in by_task)]))
    return lines


def beside(by_task):
    """Other figures of each task: accuracy of every seed, macro F1, Pearson, parse failures, grounded."""
    lines = []
    for task, cells in by_task.items():
        names = ["accuracy", "macro_f1", "pearson", "parse_failures", *GROUNDED]
        names = [name for name in names if any(name in method for method in cells[0]["methods"].values())]
        seeds = [f"seed {cell['seed']}" for cell in cells]
        lines += ["", f"{task}, {len(cells[0]['gold'])} rows; means over the seeds:", ""]
        lines += [markdown_row(["method", *seeds, *(name.replace("_", " ") for name in names)])]
        lines += ["|---" * (1 + len(seeds) + len(names)) + "|"]
        for method in present(cells):
            own = [f"{100 * cell['methods'][method]['accuracy']:.1f}" for cell in cells]
            for name in names:
                values = [cell["methods"][method].get(name) for cell in cells]
                mean = None if None in values else np.mean(values)
                own.append("" if mean is None else f"{mean:.3f}" if name == "pearson" else f"{100 * mean:.1f}")
            lines.append(markdown_row([METHODS[method], *own]))
    return lines


def promises(cells):
    """What the preview promised before PPO, and what came."""
    lines = [
        "", "## What the preview promised, and what came", "",
        "Before PPO the preview says of the choosing half how best-of-8 compares with greedy answers. What came is",
        "measured on the other rows. *False promise*: a gain was promised, and RLLR handed back none. *Missed gain*:",
        f"none was promised, and the gold reward gained {MISSED} points or more.", "",
        "| cell | verdict | best-of-8 - greedy | RLLR, last | RLLR, handed back | gold reward, handed back | |",
        "|---" * 7 + "|",
    ]  # fmt: skip
    found = [promise(cell) for cell in cells]
    for cell, row in zip(cells, found):
        note = "false promise" * row["false"] + "missed gain" * row["missed"]
        points = [row[name] for name in ("predicted", "last", "best", "gold")]
        points = ["" if value is None else f"{value:+.1f}" for value in points]
        lines.append(markdown_row([name_of(cell), row["verdict"], *points, note]))
    promised = sum(row["verdict"] == "gain" for row in found)
    predicted = [row["predicted"] for row in found]
    near = {which: correlation(predicted, [row[which] for row in found]) for which in ("last", "best")}
    shown = {which: "unknown (too few cells)" if r is None else f"{r:.2f}" for which, r in near.items()}
    return lines + [
        "",
        f"False promises: {sum(row['false'] for row in found)} of {promised} promised gains. Missed gains: "
        f"{sum(row['missed'] for row in found)} of {len(found) - promised}",
        "cells without a promise. Correlation of best-of-8 - greedy with what RLLR gained: "
        f"{shown['last']} (last), {shown['best']} (handed",
        "back).",
    ]


def list_cells(cells, commit):
    """Where each figure comes from: cell, commit, rows, time, reward models, PPO's steps, what the guard saw."""
    lines = ["", "## The cells", "", "| cell | labelled rows | rows | minutes | label pairs | rationale pairs | PPO |"]
    lines.append("|---" * 7 + "|")
    for cell in cells:
        minutes = sum(done["cpu_seconds"] for name, done in cell["stages"].items() if name != "tiny") / 60
        labelled = "all" if cell["all_labelled"] else cell["labelled"]
        pairs = [pair_facts(cell["reward_models"].get(kind)) for kind in ("label", "rationale")]
        ppo = "; ".join(map(ppo_facts, cell["ppo"], cell["ppo"].values()))
        lines.append(markdown_row([name_of(cell, commit), labelled, len(cell["gold"]), f"{minutes:.0f}", *pairs, ppo]))
    return lines + [
        "",
        "Minutes: processor time of one core, the tiny model apart, which all seeds of a task share. Pairs: how many",
        "each reward model saw, with repeats, and its accuracy on held-out pairs. PPO: what is handed back.",
    ]


def pair_facts(found):
    return "" if found is None else f"{found['pairs_seen']:,}, {100 * found['pairs']['all']['accuracy']:.1f} %"


def ppo_facts(name, facts):
    back = f"step {facts['handed_back']}" if facts["handed_back"] else "the start"
    stopped = f", stopped at {facts['steps']}" if facts["steps"] < facts["planned"] else ""
    seen = f", hacking seen at {', '.join(map(str, facts['hacking']))}" if facts["hacking"] else ""
    return f"{name.removeprefix('ppo-')}: {back}{stopped}{seen}"


def name_of(cell, commit=None):
    """A cell's name; with today's commit the cell's own behind it, where that is another one."""
    name = f"{cell['task']} {cell['model']}{' all labelled' * cell['all_labelled']} {cell['seed']}"
    return name if commit in (None, cell["commit"]) else f"{name} (commit {cell['commit']})"


def span(values, digits=2):
    """'+1.20 (-0.10 .. +2.50)' of (accuracy, difference, low, high)."""
    _, difference, low, high = (round(value, digits) + 0.0 for value in values)
    return f"{difference:+.{digits}f} ({low:+.{digits}f} .. {high:+.{digits}f})"


def markdown_row(cells):
    return f"| {' | '.join(map(str, cells))} |"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", default=str(CELLS), help="directory of the cells")
    parser.add_argument("--output", default=str(CELLS.parent / "quality.md"))
    args = parser.parse_args(argv)
    cells = read_cells(args.cells)
    if not cells:
        parser.error(f"--cells {args.cells}: no cells there; benchmarks/quality.py makes them")
    text = page(cells, commit_of(CODE))
    Path(args.output).write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
