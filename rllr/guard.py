"""PPO's guard: is the score going up while accuracy goes down? (numpy only)

A policy that exploits its reward model finds answers that score higher and are wrong more often. No number of a single
PPO step shows it, since PPO sees no gold labels. Greedy answers to dev do. The guard compares them, row by row, with
those of the policy that PPO started from; `is_reward_hacking` is the test, `benchmarks/guard.py` what it is worth.

A *look* is one evaluation on dev, {"right": [N], "scores": [N], "grounded": [N]}, the same N rows in every look. right:
how right each answer is (`metrics.row_values`), scores: what the run's judges give it, higher is better; grounded: the
share of its rationale that stands in the text, None where there is nothing to look up.
"""

import math
from statistics import NormalDist

import numpy as np

FLATTERY = 0.005  # what the start's accuracy on dev owes to having been chosen there
REMEDIES = "on-policy pairs, more labelled rows, a larger --kl_coef or a lower --learning_rate"
FALSE_ALARMS = 0.08  # shared among a run's verdicts, see `fallen`; it makes less than 5 % of runs, for three reasons:
# two looks in a row share a look, looks hang together, and a verdict asks for more than this one test
UNGROUNDED = 3.0  # standard errors by which `grounded` must lie below the start's before a warning is due
LEANING = 0.01  # of macro F1, by which it must have fallen before a warning is due


# ---- mathematics -----------------------------------------------------------------------------------------------------


def paired(now, start) -> tuple[float, float]:
    """(mean difference, its standard error) of numbers [N] that two policies have on the same rows; None: unknown.

    Rows that are unknown on either side are left out. The error is infinite for fewer than two rows: they tell nothing.
    ValueError: other numbers of rows.
    """
    now, start = np.asarray(now, float), np.asarray(start, float)
    if now.shape != start.shape:
        raise ValueError(f"{now.shape} and {start.shape}: not the same rows")
    differences = (now - start)[~np.isnan(now - start)]
    if len(differences) < 2:
        return 0.0, math.inf
    return float(differences.mean()), float(differences.std(ddof=1) / math.sqrt(len(differences)))


def beats(now, start) -> bool:
    """Whether numbers [N] are higher than the start's by more than one standard error of their paired difference."""
    difference, error = paired(now, start)
    return difference > error


def fallen(looks) -> float:
    """How many standard errors accuracy must lie below the start's in a run of so many looks: the more looks, the more
    often chance makes one. The normal quantile of FALSE_ALARMS / number of verdicts: 1.9 of 4 looks, 2.3 of 10."""
    verdicts = looks - looks // 5 - 1  # two looks make one, and the first fifth of them none
    return NormalDist().inv_cdf(1 - FALSE_ALARMS / max(1, verdicts))


def is_reward_hacking(start, before, now, looks) -> bool:
    """Score up and accuracy down, in the last two looks together: the policy exploits its reward.

    start, before, now: the look at the policy that PPO started from, and the last two, in a run of so many `looks`.
    Right and score of the two are averaged row by row, and compared with the start's:

      score up         by more than one standard error
      accuracy down    by more than FLATTERY and `fallen(looks)` standard errors
      before, too      before is down by itself, by more than one standard error: one bad look is no verdict
      not coming back  now is not above before by more than one standard error

    PPO often stumbles in its first updates, while the value model learns, and comes back: that is no hacking. Where the
    score is accuracy itself (--reward gold), it is never up and down at once.
    """
    score, score_error = paired(_mean(before, now, "scores"), start["scores"])
    right, right_error = paired(_mean(before, now, "right"), start["right"])
    down = right < -FLATTERY - fallen(looks) * right_error and beats(start["right"], before["right"])
    return score > score_error and down and not beats(now["right"], before["right"])


def _mean(before, now, name):
    return (np.asarray(before[name], float) + np.asarray(now[name], float)) / 2


def is_less_grounded(start, now) -> bool:
    """Whether rationales stand in their texts less often than the start's: by more than UNGROUNDED standard errors."""
    difference, error = paired(now["grounded"], start["grounded"])
    return difference < -UNGROUNDED * error


class Guard:
    """What the guard remembers of a run, as a checkpoint keeps it.

    start, last: looks; last is None where the next look has none before it to be judged with. seen: number of looks
    after the start. hacked: steps at which reward hacking was found. told: whether the fall of `grounded` was told of.
    """

    def __init__(self):
        self.start, self.last, self.seen, self.hacked, self.told = None, None, 0, [], False

    def sees_hacking(self, step, look, looks) -> bool:
        """The verdict on a new look, one of `looks`. The first fifth of them, in which PPO may stumble, does not count.
        After reward hacking two new looks make the next verdict."""
        found = self.last is not None and is_reward_hacking(self.start, self.last, look, looks)
        self.seen += 1
        keeps = not found and self.seen > looks // 5
        # New lists, never changed ones: a checkpoint may hold the old.
        self.hacked, self.last = self.hacked + [step] * found, look if keeps else None
        return found

    def sees_less_grounded(self, look) -> bool:
        """Whether rationales have come loose from their texts; true once in a run."""
        found = not self.told and is_less_grounded(self.start, look)
        self.told = self.told or found
        return found


# ---- for people ------------------------------------------------------------------------------------------------------


def hacking_sentence(start, before, now, what="accuracy") -> str:
    """What the guard has found, in numbers. what: the name of `right`, in points of 100."""
    score, _ = paired(_mean(before, now, "scores"), start["scores"])
    right, error = paired(_mean(before, now, "right"), start["right"])
    return (
        f"reward hacking: in the last two looks at dev the score is {score:.2f} above the start's and {what} "
        f"{-100 * right:.1f} points below it (standard error {100 * error:.1f})"
    )


def grounded_sentence(start, now, paid) -> str:
    """How far `grounded` has fallen, and what that means. paid: whether the reward pays for it already."""
    difference, error = paired(now["grounded"], start["grounded"])
    return (
        f"warning: rationales stand in their texts less often than at the start: grounded fell by "
        f"{-100 * difference:.1f} points (standard error {100 * error:.1f}); "
        + ("the label pays more than that" if paid else "--reward mixed --rationale_rm grounded pays for it, too")
    )


def leaning_sentence(before, after) -> str | None:
    """What it means where accuracy has risen and macro F1, in which every label counts alike, has fallen; None where it
    has not, or where the task does not report both (stsb). before, after: dev scores."""
    if not {"accuracy", "macro_f1"} <= before.keys():
        return None
    falls = before["macro_f1"] - after["macro_f1"]
    if after["accuracy"] <= before["accuracy"] or falls < LEANING:
        return None
    return (
        "warning: accuracy rose, but macro F1 fell "
        f"({100 * before['macro_f1']:.1f} -> {100 * after['macro_f1']:.1f} %): the policy that is handed back leans to "
        "the larger classes; look at its labels (rllr.evaluate)"
    )
