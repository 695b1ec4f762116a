"""Is the guard right? How many healthy runs it stops, and how many that fall: simulated on real paired answers.

    python benchmarks/guard.py                                          # the simulation, from guard-answers.json
    python benchmarks/guard.py --record paper --policy ... --steps 100 --eval_every 10 --eval_rows 1000 ...

--record NAME runs train_ppo.py with the flags that follow and keeps, for every look at dev, which rows are right and
what the judges gave them. The simulation draws dev sets from the rows of the run `on_policy`, all looks of a row
together, so that the looks of a simulated run hang together as real ones do. `Rows.simulated` says how a truth is given
to them. The judges' scores are that run's, and rise: the guard has to tell by accuracy alone.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from common import write_result

from rllr.guard import Guard

ROOT = Path(__file__).resolve().parent.parent
ANSWERS = ROOT / "benchmarks" / "results" / "guard-answers.json"
BASIS = "on_policy"  # the recorded run whose rows the simulation draws
FALL, FLATTERY = 0.05, 0.005
DEV_ROWS, LOOKS = (400, 1000), (4, 6, 10)


# ---- real answers ----------------------------------------------------------------------------------------------------


def record(name, flags):
    """Run PPO and keep its looks, right or wrong as a string of bits and scores in hundredths, under a name."""
    import train_ppo
    from rllr.keeper import Keeper

    plain, looks = Keeper.look, []

    def look(self, step):
        scores, found = plain(self, step)
        looks.append({
            "step": step, "right": "".join(str(int(right)) for right in found["right"]),
            "scores": [round(100 * score) for score in found["scores"]],
        })  # fmt: skip
        return scores, found

    Keeper.look = look
    train_ppo.main([*flags, "--on_hacking", "ignore"])
    answers = json.loads(ANSWERS.read_text()) if ANSWERS.is_file() else {}
    command = " ".join(["python benchmarks/guard.py --record", name, *flags])
    ANSWERS.write_text(json.dumps(answers | {name: {"command": command, "looks": looks}}) + "\n")


# ---- simulated runs --------------------------------------------------------------------------------------------------


class Rows:
    """What the rows of a recorded run do: differences [looks, rows], 1 where a row is right other than at the start,
    -1 where it is wrong other than at the start; gains [looks, rows], what its score gains."""

    def __init__(self, recorded):
        looks = recorded["looks"]
        right = np.array([[int(bit) for bit in look["right"]] for look in looks])
        scores = np.array([look["scores"] for look in looks]) / 100
        self.differences, self.gains = right[1:] - right[0], scores[1:] - scores[0]
        changed = self.differences != 0
        self.changing = changed.mean()  # share of the rows that differ from the start
        self.staying = changed[1:][changed[:-1]].mean()  # of those, the share that differs at the next look, too

    def drawn(self, rng, size, count):
        """(differences, gains) [count, size] of rows drawn with replacement; looks evenly spread, the last among them.
        ValueError: fewer looks than that were recorded."""
        if count > len(self.gains):
            raise ValueError(f"{count} looks of {len(self.gains)}")
        which = np.linspace(-1, len(self.gains) - 1, count + 1).round().astype(int)[1:]
        cells = np.ix_(which, rng.integers(0, self.gains.shape[1], size))
        return self.differences[cells], self.gains[cells]

    def simulated(self, rng, size, truth):
        """(differences, gains) [count, size] with a truth [count], the share of rows won less those lost at each look.

        Rows are drawn with replacement, all looks of a row together; which of them change, and when, is real. A run of
        more looks than were recorded goes on with the real rates at which rows change and change back. Whether a row's
        changes are lost or won is drawn once for the row, with the probability that gives the truth: a row that was
        right at the start can only be lost, one that was wrong only won.
        """
        count = len(truth)
        differences, gains = self.drawn(rng, size, min(count, len(self.gains)))
        changes, beginning = list(differences != 0), self.changing * (1 - self.staying) / (1 - self.changing)
        while len(changes) < count:
            changes.append(rng.random(size) < np.where(changes[-1], self.staying, beginning))
        gains = np.concatenate([gains, np.repeat(gains[-1:], count - len(gains), 0)])
        changed = np.array(changes)
        lost = rng.random(size) < 0.5 - (np.asarray(truth) / (2 * changed.mean(1)))[:, None]
        return changed * np.where(lost, -1, 1), gains


def is_stopped(differences, gains) -> bool:
    """Whether the guard finds reward hacking at some look of a run."""
    watch, zeros = Guard(), np.zeros(differences.shape[1])
    watch.start = {"right": zeros, "scores": zeros}
    looks = ({"right": right, "scores": score} for right, score in zip(differences, gains))
    return any(watch.sees_hacking(number, look, len(gains)) for number, look in enumerate(looks))


def truths(looks):
    """{what a run does: (whether it falls, its truth at each look)}; the start is flattered by FLATTERY in all but
    one."""
    ramp, flat = np.arange(1, looks + 1) / looks, np.ones(looks)
    dip = np.where(np.arange(looks) == 0, -FALL, 0.03)
    longer = np.where(np.arange(looks) < max(1, looks // 5), -FALL, 0.03)
    return {
        "no change": (False, 0 * flat),
        "no change, start flattered": (False, -FLATTERY * flat),
        "steady gain to +5": (False, FALL * ramp - FLATTERY),
        "dip to -5 at the first look, then +3": (False, dip - FLATTERY),
        "dip to -5 in the first fifth, then +3": (False, longer - FLATTERY),
        "falls to -5, gradually": (True, -FALL * ramp - FLATTERY),
        "falls to -5 early, and stays": (True, -FALL * flat - FLATTERY),
    }


def simulate(recorded, runs, seed):
    """[(what the runs do, whether they fall, {(rows, looks): share stopped})]."""
    rng, lines = np.random.default_rng(seed), []
    real = {name: Rows(found) for name, found in recorded.items()}
    settings = [(rows, looks) for rows in DEV_ROWS for looks in LOOKS]
    for name in truths(2):
        shares = {}
        for rows, looks in settings:
            truth = truths(looks)[name][1]
            stopped = [is_stopped(*real[BASIS].simulated(rng, rows, truth)) for _ in range(runs)]
            shares[rows, looks] = float(np.mean(stopped))
        lines.append((name, truths(2)[name][0], shares))
    for name, rows_of in real.items():
        lowest, end = 100 * rows_of.differences.mean(1).min(), 100 * rows_of.differences[-1].mean()
        shares = {
            (rows, looks): float(np.mean([is_stopped(*rows_of.drawn(rng, rows, looks)) for _ in range(runs)]))
            for rows, looks in settings if looks <= len(rows_of.gains)
        }  # fmt: skip
        lines.append((f"the real run, {name}, as it was (lowest {lowest:+.1f}, at its end {end:+.1f})", None, shares))
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", help="name of a run to record; all further flags are those of train_ppo.py")
    parser.add_argument("--runs", type=int, default=1000, help="simulated runs in each cell")
    parser.add_argument("--seed", type=int, default=0)
    args, flags = parser.parse_known_args()
    if args.record:
        record(args.record, flags)
        return
    if flags:
        parser.error(f"unknown: {' '.join(flags)}")
    recorded = json.loads(ANSWERS.read_text())
    lines = simulate(recorded, args.runs, args.seed)
    settings = list(lines[0][2])
    heads = [f"{rows} rows, {looks} looks" for rows, looks in settings]
    table = ["| runs | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, _, shares in lines:
        table.append(
            f"| {name} | " + " | ".join(f"{100 * shares[s]:.1f}" if s in shares else "" for s in settings) + " |"
        )
    commands = [f"    {found['command']}" for found in recorded.values()]
    text = [f"Runs in which the guard finds reward hacking, in %, {args.runs} simulated in each cell.", "", *table, ""]
    write_result("guard", "Healthy runs, and runs that fall", [*text, "The real runs:", "", *commands], {"cells": [
        {"runs": name, "falls": falls, "rows": rows, "looks": looks, "stopped": share}
        for name, falls, shares in lines for (rows, looks), share in shares.items()
    ]})  # fmt: skip


if __name__ == "__main__":
    main()
