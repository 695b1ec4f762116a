"""Metrics of answers against gold labels, their intervals, and how they are compared."""

import math

import numpy as np

from .answers import Answer
from .grounding import grounded, means_by_right
from .tasks import Example, Task

CORRELATIONS = ("pearson", "spearman")
MANY_FAILURES = 0.5  # share of answers without a readable label, above which a warning is due


def accuracy(gold: list, predicted: list) -> float:
    """Share of rows whose predicted label is the gold one; None (a parse failure) is wrong."""
    return sum(g == p for g, p in zip(gold, predicted, strict=True)) / len(gold)


def macro_f1(gold: list, predicted: list, labels) -> float:
    """Mean over the labels that occur (in gold or predictions) of F1 = 2 TP / (2 TP + FP + FN)."""
    scores = []
    for label in labels:
        hits = sum(g == p == label for g, p in zip(gold, predicted, strict=True))
        claims, cases = predicted.count(label), gold.count(label)
        if claims + cases:
            scores.append(2 * hits / (claims + cases))
    return sum(scores) / len(scores)


def pearson(x, y) -> float:
    """Linear correlation; 0 where either side is constant."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    if np.ptp(x) == 0 or np.ptp(y) == 0:  # asked first: the mean of equal floats may be rounded, and leave a remainder
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y) / math.sqrt(float((x @ x) * (y @ y)))


def spearman(x, y) -> float:
    """Rank correlation: Pearson of the ranks, ties sharing their mean rank."""
    return pearson(_ranks(x), _ranks(y))


def _ranks(x):
    _, inverse, counts = np.unique(np.asarray(x, float), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def answer_metrics(task: Task, examples: list[Example], answers: list[Answer]) -> dict[str, float]:
    """The task's metrics; `parse_failures`, the share of answers without a readable label; and where there are
    rationales, `grounded`: their mean, and that of right and of wrong answers (`grounded_right`, `grounded_wrong`).

    For correlations a parse failure counts as the label farthest from the gold one, so that not answering never pays.
    """
    shares = [grounded(task, e, a.text) for e, a in zip(examples, answers, strict=True)]
    right = [e.label == a.label for e, a in zip(examples, answers)]
    return {
        **_metrics(task, *_columns(task, examples, answers)),
        "parse_failures": sum(answer.label is None for answer in answers) / len(answers),
        **means_by_right("grounded", shares, right),
    }


def row_values(task: Task, examples: list[Example], answers: list[Answer]) -> list[float]:
    """How right each answer is, so that two policies can be compared row by row: 1 or 0.

    Where the task's metric is a correlation, which no single row has: the answer's closeness to the gold label,
    1 - |answer - gold| / length of the scale; a parse failure counts as the label farthest away.
    """
    gold, predicted, target, numbers = _columns(task, examples, answers)
    if task.metric not in CORRELATIONS:
        return [float(g == p) for g, p in zip(gold, predicted)]
    scale = [float(label) for label in task.labels]
    return (1 - np.abs(numbers - target) / (max(scale) - min(scale))).tolist()


def _columns(task, examples, answers):
    """Gold labels, predicted labels and, for ordinal tasks, both as numbers (arrays, so that rows can be drawn)."""
    gold = np.array([example.label for example in examples], dtype=object)
    predicted = np.array([answer.label for answer in answers], dtype=object)
    if not set(CORRELATIONS) & set(task.metrics):
        return gold, predicted, None, None
    scale = [float(label) for label in task.labels]
    target = [float(e.label) if e.score is None else e.score for e in examples]
    numbers = [
        float(p) if p is not None else max(scale, key=lambda value: abs(value - t)) for p, t in zip(predicted, target)
    ]
    return gold, predicted, np.array(target), np.array(numbers)


def _metrics(task, gold, predicted, target, numbers):
    gold, predicted = gold.tolist(), predicted.tolist()
    compute = {
        "accuracy": lambda: accuracy(gold, predicted),
        "macro_f1": lambda: macro_f1(gold, predicted, task.labels),
        "pearson": lambda: pearson(numbers, target),
        "spearman": lambda: spearman(numbers, target),
    }
    return {name: compute[name]() for name in task.metrics}


def rank(task: Task, scores: dict) -> tuple:
    """What epochs and checkpoints are compared by: the task's metric, fewer parse failures, its other metrics."""
    others = [scores[name] for name in task.metrics if name != task.metric]
    return scores[task.metric], -scores["parse_failures"], *others


def still_rising(last: float, before: float, rows: int) -> bool:
    """Whether accuracy at the last look at `rows` rows is above the best one before by more than a standard error of
    it: training seems to have stopped on its way up."""
    return last - before > (last * (1 - last) / rows) ** 0.5


def bootstrap_interval(values, seed=0, resamples=1000):
    """95 % percentile interval of `values(rows)`, a function of drawn row indices; values.size rows. (low, high)."""
    rng = np.random.default_rng(seed)
    drawn = [values(rng.integers(0, values.size, values.size)) for _ in range(resamples)]
    return tuple(float(v) for v in np.percentile(drawn, [2.5, 97.5]))


def wilson_interval(share, n, z=1.959964):
    """95 % interval of a share (Wilson's score interval)."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


class _Statistic:
    """A function of row indices that knows how many rows there are."""

    def __init__(self, function, size):
        self.function, self.size = function, size

    def __call__(self, rows):
        return self.function(rows)


def mcnemar(first_right, second_right) -> float:
    """Exact two-sided McNemar test: p-value that the rows only one of two models has right split evenly."""
    only_first = sum(a and not b for a, b in zip(first_right, second_right, strict=True))
    only_second = sum(b and not a for a, b in zip(first_right, second_right, strict=True))
    n, k = only_first + only_second, min(only_first, only_second)
    if n == 0:
        return 1.0
    log_tail = [
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(k + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(term) for term in log_tail))


def metric_line(scores) -> str:
    """'accuracy 71.2 %  macro_f1 71.0 %  parse_failures 0.3 %  grounded 58.2 % (right 70.1, wrong 28.9)  score 0.31'
    (correlations as they are)."""
    names = ("accuracy", "macro_f1", *CORRELATIONS, "parse_failures")
    parts = [
        f"{name} {scores[name]:.3f}" if name in CORRELATIONS else f"{name} {100 * scores[name]:.1f} %"
        for name in names
        if name in scores
    ]
    parts += [f"grounded {grounded_words(scores)}"] if "grounded" in scores else []
    return "  ".join(parts + ([f"score {scores['score']:.2f}"] if "score" in scores else []))


def grounded_words(scores) -> str:
    """'58.2 % (right 70.1, wrong 28.9)': how grounded all answers are, the right ones and the wrong ones."""
    named = {"right": "grounded_right", "wrong": "grounded_wrong"}
    apart = ", ".join(f"{kind} {100 * scores[name]:.1f}" for kind, name in named.items() if name in scores)
    return f"{100 * scores['grounded']:.1f} % ({apart})"


def tell_parse_failures(share, log, whose="answers on dev"):
    """Warn where most answers carry no readable label: no accuracy and no label reward means anything then."""
    if share > MANY_FAILURES:
        log(
            f"warning: {100 * share:.0f} % of the {whose} have no readable label (a last line `Label: <label>`): "
            "train SFT longer, or "
            "raise --max_new_tokens where they are cut"
        )
