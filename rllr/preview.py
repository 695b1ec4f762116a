"""PPO's preview: is the best-scored of n sampled answers right more often than the greedy answer? (numpy only)

PPO raises what the reward model scores high among the answers that the policy really writes. Best-of-n does the same
without training: of n samples it takes the one with the highest score. Where its accuracy rises with n, PPO has
something to gain; where it turns down, PPO would learn the reward model's mistakes (Gao et al. 2023, "Scaling laws for
reward model overoptimization", arXiv:2210.10760). The curve costs S samples for each of P prompts, and no training.

Everywhere: scores [P, S] are the reward model's, higher is better, and may be infinite but not NaN; right [P, S] says
whether a sample has the gold label; greedy_right [P] says the same of the greedy answer. Arrays or nested lists;
booleans may be given as 0 and 1. Accuracies, differences and shares are fractions of 1, KL is in nats.
"""

import math

import numpy as np

JUDGED_AT = 8  # the verdict "gain" is read at this n, or at the largest below it that the samples allow
RESAMPLES = 1000
ROUNDING = 1e-9  # a difference as small as this is rounding: no verdict rests on it
REMEDIES = "more labelled rows, on-policy pairs (from the policy's own samples) or another reward model"


# ---- mathematics -----------------------------------------------------------------------------------------------------


def best_of_n(scores, right, n) -> np.ndarray:
    """[P]: the probability that the best-scored of n of a prompt's S samples is right; every n of them equally likely.

    The n are drawn without replacement, so this is the mean over all C(S, n) subsets: exact for these samples, and
    unbiased for n fresh ones. Equal scores share the choice equally. Let L samples score below a group of E equal
    scores. The best of n is in the group with probability (C(L + E, n) - C(L, n)) / C(S, n), and then it is each of
    the E with the same probability. The quotients of binomials are products of n factors, so nothing overflows.
    (The estimator of Nakano et al. 2021, arXiv:2112.09332, and of Hilton and Gao 2022, "Measuring Goodhart's law",
    which average over the subsets of size n; the ties are ours.)
    ValueError: shapes that differ, a score that is NaN, n < 1 or n > S.
    """
    scores, right = _checked(scores, right)
    size = scores.shape[1]
    if not 1 <= n <= size:
        raise ValueError(f"best of {n}: n must be 1 to {size}, the number of samples per prompt")
    below, equal = _standing(scores)
    drawn = np.arange(n)
    # inside[m] = C(m, n) / C(S, n), the probability that all n are among m samples; for m < n one factor is 0
    inside = np.prod((np.arange(size + 1)[:, None] - drawn) / (size - drawn), axis=1)
    weights = (inside[below + equal] - inside[below]) / equal
    return np.clip((weights * right).sum(1), 0.0, 1.0)


def kl_bound(n) -> float:
    """KL, in nats, of best-of-n from the policy that is sampled: log n - (n - 1) / n. ValueError: n < 1.

    Stiennon et al. 2020, arXiv:2009.01325; Gao et al. 2023, arXiv:2210.10760. It is exact where no two samples are
    ever equal or score the same; for a language model it is an upper bound (Beirami et al. 2024, arXiv:2401.01879).
    """
    if n < 1:
        raise ValueError(f"best of {n}: n must be at least 1")
    return math.log(n) - (n - 1) / n


def pair_accuracy(scores, right) -> float | None:
    """How well the scores order a prompt's samples: the share of (right, wrong) pairs in which the right one is higher.

    Ties count one half. The mean over the prompts that have both kinds, each with the same weight; None where no
    prompt has both. A prompt's share is the area under its ROC curve, here from the ranks (Mann and Whitney's U).
    ValueError: shapes that differ, a score that is NaN.
    """
    scores, right = _checked(scores, right)
    below, equal = _standing(scores)
    rights = right.sum(1)
    wrongs = right.shape[1] - rights
    both = (rights > 0) & (wrongs > 0)
    if not both.any():
        return None
    ranks = below + (equal + 1) / 2  # from 1; equal scores have the mean of their ranks
    won = (ranks * right).sum(1) - rights * (rights + 1) / 2
    return float((won[both] / (rights * wrongs)[both]).mean())


def mixed_share(labels) -> float:
    """Share of prompts whose samples differ in label; labels: one list per prompt. ValueError: no prompt.

    None, an answer without a readable label, counts as a label of its own. Where this share is near 0, the samples
    leave nothing to choose from, and nothing to learn from.
    """
    if len(labels) == 0:
        raise ValueError("no prompts")
    return sum(len(set(row)) > 1 for row in labels) / len(labels)


def _checked(scores, right):
    """Both as arrays [P, S], float and bool. ValueError where they are not that, or a score is NaN."""
    scores, right = np.asarray(scores, float), np.asarray(right)
    if scores.ndim != 2 or 0 in scores.shape:
        raise ValueError(f"scores must be [prompts, samples], at least one of each, not {list(scores.shape)}")
    if right.shape != scores.shape:
        raise ValueError(f"right {list(right.shape)} must have the shape of scores {list(scores.shape)}")
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} of {scores.size} scores are NaN")
    return scores, _booleans(right, "right")


def _booleans(values, name):
    if not np.isin(values, (0, 1)).all():
        raise ValueError(f"{name} must hold booleans")
    return values.astype(bool)


def _standing(scores):
    """Of each sample, how many of its prompt's samples score lower, and how many the same (itself included): [P, S]."""
    order = np.argsort(scores, axis=1, kind="stable")
    ranked = np.take_along_axis(scores, order, 1)
    position = np.arange(scores.shape[1])
    step = ranked[:, 1:] != ranked[:, :-1]  # where a higher score begins
    edge = np.ones((len(scores), 1), bool)
    first = np.maximum.accumulate(np.where(np.hstack([edge, step]), position, 0), axis=1)
    last = np.where(np.hstack([step, edge]), position, scores.shape[1])
    last = np.minimum.accumulate(last[:, ::-1], axis=1)[:, ::-1]
    below, equal = np.empty_like(order), np.empty_like(order)
    np.put_along_axis(below, order, first, 1)
    np.put_along_axis(equal, order, last - first + 1, 1)
    return below, equal


# ---- the preview -----------------------------------------------------------------------------------------------------


def preview(scores, right, greedy_right, ns=(1, 2, 4, 8, 16), seed=0) -> dict:
    """The best-of-n curve beside greedy answers to the same prompts, and what it says about PPO. JSON can hold it.

    {"prompts": P, "samples": S, "greedy": accuracy, "pair_accuracy": see there, "mixed": share of prompts with right
    and wrong samples, "curve": [{"n", "accuracy", "kl", "difference", "low", "high"}, ...] by rising n, "verdict"}.
    difference: best-of-n minus greedy. low, high: its 95 % percentile bootstrap interval over prompts (Efron and
    Tibshirani 1993, chapter 13), paired, 1,000 resamples, the same ones for every n. An n above S is left out.

    verdict, in this order:
      "loss"     high is below 0 at n = 8 or beyond it, or at the largest n the difference is more than one paired
                 standard error below 0 (below n = 8 a low curve only says that one sample is worse than greedy)
      "gain"     low is above 0 at n = 8; where the curve lacks it, at its largest n from 2 to 7 (if none, its smallest)
      "unclear"  anything else; also a single prompt, which has no spread, and n = 1 alone, where no score chooses
    ValueError: what best_of_n refuses, greedy_right that is not [P], no n left.
    """
    scores, right = _checked(scores, right)
    greedy = np.asarray(greedy_right)
    if greedy.shape != scores.shape[:1]:
        raise ValueError(f"greedy_right {list(greedy.shape)} must have one entry per prompt, {len(scores)}")
    greedy = _booleans(greedy, "greedy_right")
    ns = sorted({int(n) for n in ns if n <= scores.shape[1]})
    if not ns:
        raise ValueError(f"no n for {scores.shape[1]} samples per prompt")
    best = np.stack([best_of_n(scores, right, n) for n in ns], 1)
    differences = best - greedy[:, None]
    low, high = _intervals(differences, seed)
    curve = [
        {"n": n, "accuracy": float(a), "kl": kl_bound(n), "difference": float(d), "low": float(lo), "high": float(hi)}
        for n, a, d, lo, hi in zip(ns, best.mean(0), differences.mean(0), low, high)
    ]
    return {
        "prompts": len(scores),
        "samples": scores.shape[1],
        "greedy": float(greedy.mean()),
        "pair_accuracy": pair_accuracy(scores, right),
        "mixed": mixed_share(right.tolist()),
        "curve": curve,
        "verdict": _verdict(curve, differences[:, -1]),
    }


def _intervals(differences, seed):
    """95 % percentile bootstrap intervals of the column means of [P, N], rows drawn together: low [N], high [N]."""
    rng, size = np.random.default_rng(seed), len(differences)
    means = [differences[rng.integers(0, size, size)].mean(0) for _ in range(RESAMPLES)]
    return np.percentile(means, [2.5, 97.5], axis=0)


def _verdict(curve, at_largest):
    """See preview; at_largest [P]: the differences at the largest n."""
    chosen = [point for point in curve if point["n"] > 1]
    if not chosen or len(at_largest) < 2:
        return "unclear"
    error = at_largest.std(ddof=1) / math.sqrt(len(at_largest))
    judged = _judged(curve)
    beyond = [point for point in chosen if point["n"] >= judged["n"]]
    if any(point["high"] < -ROUNDING for point in beyond) or at_largest.mean() < -error - ROUNDING:
        return "loss"
    return "gain" if judged["low"] > ROUNDING else "unclear"


def _judged(curve):
    """The point that "gain" is read at; n = 1, where no score chooses, only if there is no other."""
    chosen = [point for point in curve if point["n"] > 1] or curve
    return max((p for p in chosen if p["n"] <= JUDGED_AT), key=lambda p: p["n"], default=chosen[0])


# ---- for people ------------------------------------------------------------------------------------------------------


def sentence(found) -> str:
    """What a preview says, in one sentence: the numbers, what they mean for PPO, and what helps where it would not."""
    curve, verdict = found["curve"], found["verdict"]
    judged = _judged(curve)
    shown = judged
    if verdict == "loss":  # its worst point
        shown = min((point for point in curve if point["n"] > 1), key=lambda point: point["difference"])
    text = (
        f"Best-of-{shown['n']} is right in {100 * shown['accuracy']:.1f} % and the greedy answer in "
        f"{100 * found['greedy']:.1f} % of {found['prompts']} prompts ({_points(shown)}), "
    )
    if verdict == "gain":
        text += "so PPO has something to gain from this reward model"
        return f"{text}; {_flags(judged)} has that without PPO."
    if curve[-1]["n"] == 1 or found["prompts"] < 2:
        return text + "which says nothing about the reward model: sample at least 2 answers to at least 2 prompts."
    text += (
        "so PPO would learn this reward model's mistakes"
        if verdict == "loss"
        else "so it is unclear whether PPO can gain from this reward model"
    )
    text += f": what helps is {REMEDIES}"
    if judged["low"] > ROUNDING:  # only beside "loss": choosing among few answers works, optimising further does not
        text += f"; best-of-{judged['n']} beats greedy ({_points(judged)}), "
        text += "so choosing among a few answers helps where training on does not"
        text += f" ({_flags(judged)})"
    elif judged["difference"] > ROUNDING:
        text += f"; best-of-{judged['n']} beats greedy only within chance"
        text += " (more prompts would tell)" if shown is judged else f" ({_points(judged)})"
    return text + "."


def _flags(point):
    return f"rllr.predict --best_of {point['n']} --label_rm DIR"


def table(found) -> str:
    """The curve as aligned text, greedy first."""
    lines = [
        f"{'answer':>12}  {'accuracy':>8}  {'KL (nats)':>9}  difference to greedy (95 % interval)",
        f"{'greedy':>12}  {100 * found['greedy']:>6.1f} %",
    ]
    for point in found["curve"]:
        name = f"best of {point['n']}"
        lines.append(f"{name:>12}  {100 * point['accuracy']:>6.1f} %  {point['kl']:>9.2f}  {_points(point)}")
    return "\n".join(lines)


def _points(point):
    """'+4.3 points, +2.1 .. +6.5'"""
    difference, low, high = (round(100 * point[name], 1) + 0.0 for name in ("difference", "low", "high"))  # no -0.0
    return f"{difference:+.1f} points, {low:+.1f} .. {high:+.1f}"
