"""Label accuracy before and after: greedy answers, metrics with intervals, models compared on the same rows.

    python -m rllr.evaluate --task sst2 --eval_file dev.jsonl --models runs/sst2/sft runs/sst2/ppo-label/last

Prints a table and writes, with --output_dir, evaluate.json and one answers-*.jsonl per model.
"""

import json
import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .common.config import check_choice, check_positive, parse_config
from .data.encoding import Encoder
from .common.errors import InputError, command
from .common.files import write_json
from .common.log import say
from .model.loading import allow_remote_code, load_policy, load_tokenizer
from .rollout import generate
from .data.splits import DataConfig, inherit, load_evaluation
from .tasks import Example, Task, parse_answer
from .run.training import check_same_task, read_record, resolve_task, set_up, task_of_record
from .model.trial import check_policy


@dataclass(frozen=True)
class Answer:
    """What a model answered: the text, the label read from it (None: parse failure), whether the length limit cut it."""

    text: str
    label: str | None
    truncated: bool


def answer_rows(model, encoder, task, examples, max_new_tokens, batch_size=64, autocast=nullcontext) -> list[Answer]:
    """The model's greedy answers, in the order of the examples."""
    prompts = [encoder.prompt_ids(task.render_prompt(example.text, example.text_b)) for example in examples]
    with autocast():
        rollout = generate(
            model,
            prompts,
            max_new_tokens=max_new_tokens,
            eos_token_id=encoder.stop_ids,
            greedy=True,
            batch_size=batch_size,
        )
    texts = [encoder.decode(response) for response in rollout.responses()]
    return [Answer(text, parse_answer(task, text), cut) for text, cut in zip(texts, rollout.truncated.tolist())]


# ---- metrics ---------------------------------------------------------------------------------------------------------


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


def score_answers(task: Task, examples: list[Example], answers: list[Answer]) -> dict[str, float]:
    """The task's metrics and `parse_failures`, the share of answers without a readable label.

    For correlations a parse failure counts as the label farthest from the gold one, so that not answering never pays.
    """
    return {
        **_metrics(task, *_columns(task, examples, answers)),
        "parse_failures": sum(answer.label is None for answer in answers) / len(answers),
    }


def _columns(task, examples, answers):
    """Gold labels, predicted labels and, for ordinal tasks, both as numbers (object arrays, so that rows can be drawn)."""
    gold = np.array([example.label for example in examples], dtype=object)
    predicted = np.array([answer.label for answer in answers], dtype=object)
    if not {"pearson", "spearman"} & set(task.metrics):
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


def bootstrap_interval(values, seed=0, resamples=1000):
    """95 % percentile interval of `values(rows)`, a function of drawn row indices; values.size rows. (low, high)."""
    rng = np.random.default_rng(seed)
    drawn = [values(rng.integers(0, values.size, values.size)) for _ in range(resamples)]
    return tuple(float(v) for v in np.percentile(drawn, [2.5, 97.5]))


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


def compare(task, examples, answers_by_model, seed=0) -> list[dict]:
    """One row per model: metrics, 95 % interval of the task's metric, and against the first model the paired difference
    with its interval and, on accuracy, McNemar's p. Intervals by bootstrap over rows, the same rows for both models."""
    columns = [_columns(task, examples, answers) for answers in answers_by_model.values()]
    size = len(examples)

    def metric(which, rows):
        return _metrics(task, *(None if c is None else c[rows] for c in columns[which]))[task.metric]

    results = []
    right = [[g == p for g, p in zip(c[0], c[1])] for c in columns]
    everything = np.arange(size)
    for i, (name, answers) in enumerate(answers_by_model.items()):
        row = {"model": name, "rows": size, **score_answers(task, examples, answers)}
        row["truncated"] = sum(answer.truncated for answer in answers) / size
        row["interval"] = bootstrap_interval(_Statistic(lambda rows: metric(i, rows), size), seed)
        if i > 0:
            row["difference"] = metric(i, everything) - metric(0, everything)
            row["difference_interval"] = bootstrap_interval(
                _Statistic(lambda rows: metric(i, rows) - metric(0, rows), size), seed
            )
            row["mcnemar_p"] = mcnemar(right[0], right[i])
        results.append(row)
    return results


def rank(task: Task, scores: dict) -> tuple:
    """What epochs and checkpoints are compared by: the task's metric, then fewer parse failures, then its other metrics."""
    others = [scores[name] for name in task.metrics if name != task.metric]
    return scores[task.metric], -scores["parse_failures"], *others


# ---- for people ------------------------------------------------------------------------------------------------------


def metric_line(scores) -> str:
    """'accuracy 71.2 %  macro_f1 71.0 %  parse_failures 0.3 %' (correlations as they are)."""
    shown = {k: scores[k] for k in ("accuracy", "macro_f1", "pearson", "spearman", "parse_failures") if k in scores}
    return "  ".join(
        f"{name} {value:.3f}" if name in ("pearson", "spearman") else f"{name} {100 * value:.1f} %"
        for name, value in shown.items()
    )


MANY_FAILURES = 0.5  # share of answers without a readable label, above which a warning is due


def tell_parse_failures(share, log, whose="answers on dev"):
    """Warn where most answers carry no label that can be read: no accuracy and no label reward can mean anything then."""
    if share > MANY_FAILURES:
        log(
            f"warning: {100 * share:.0f} % of the {whose} have no readable label (a last line `Label: <label>`): train SFT longer, or "
            "raise --max_new_tokens where they are cut"
        )


def show_samples(task, examples, answers, count):
    """The first `count` rows: prompt, answer, parsed and gold label."""
    for example, answer in list(zip(examples, answers))[:count]:
        say(f"  prompt  {task.render_prompt(example.text, example.text_b)!r}")
        say(f"  answer  {answer.text!r}")
        say(f"  label   {answer.label or 'parse failure'} (gold: {example.label})\n")


def table(task, results) -> str:
    """The comparison as aligned text."""
    percent = task.metric in ("accuracy", "macro_f1")
    scale, unit = (100, " %") if percent else (1, "")
    digits = 1 if percent else 3
    width = max(len("model"), *(len(row["model"]) for row in results))
    lines = [
        f"{'model':{width}}  {task.metric:>10}  {'95 % interval':>16}  {'parse fail.':>11}  difference to the first"
    ]
    for row in results:
        low, high = (scale * v for v in row["interval"])
        line = f"{row['model']:{width}}  {scale * row[task.metric]:>{10 - len(unit)}.{digits}f}{unit}"
        line += f"  {f'{low:.{digits}f} .. {high:.{digits}f}':>16}  {100 * row['parse_failures']:>9.1f} %"
        if "difference" in row:
            low, high = (scale * v for v in row["difference_interval"])
            line += f"  {scale * row['difference']:+.{digits}f} ({low:+.{digits}f} .. {high:+.{digits}f}), McNemar p {row['mcnemar_p']:.2g}"
        lines.append(line)
    return "\n".join(lines)


@dataclass
class Config(DataConfig):
    models: list | None = None  # directories or hub names; the first is the one the others are compared with
    base: str | None = None  # where the base of --models that are adapters lies now, if it has moved
    output_dir: str | None = None  # where evaluate.json and the answers go; without it they are only printed
    overwrite: bool = False  # replace an evaluation that is already there
    max_new_tokens: int = 48  # of an answer
    batch_size: int = 256  # prompts decoded together
    part: str = "eval"  # demo only: eval (dev) or test
    precision: str = "fp32"  # fp32, or bf16 for autocast (GPU)
    seed: int = 0  # of the bootstrap
    trust_remote_code: bool = False  # let a model's own Python code run, as some hub models need


@command
def main(argv=None):
    config = parse_config(Config, argv, __doc__)
    allow_remote_code(config.trust_remote_code)
    check_positive(config, "max_new_tokens", "batch_size")
    check_choice(config, "part", ("eval", "test"))
    check_choice(config, "precision", ("fp32", "bf16"))
    if not config.models:
        raise InputError("--models: give one or more model directories")
    if config.output_dir and (Path(config.output_dir) / "evaluate.json").exists() and not config.overwrite:
        raise InputError(f"--output_dir {config.output_dir}: already holds an evaluation; give another or --overwrite")
    records = {name: read_record(name) for name in config.models}
    first = records[config.models[0]]
    task = resolve_task(config, first, config.models[0])
    inherit(config, first, config.models[0])
    device, autocast = set_up(config.precision, config.seed)
    tokenizers = {
        name: load_tokenizer(name) for name in config.models
    }  # all of them are there before the first one works
    for name, record in records.items():
        check_same_task(record, task, f"--models {name}")
    config.policy = config.models[0]
    examples = load_evaluation(config, task, config.part, say, first)
    answers = {}
    for name in config.models:
        own_task = task_of_record(records[name]) or task  # a label-only model is asked in its own way
        model = load_policy(name, device=device, base=config.base)
        encoder = Encoder(tokenizers[name], model, records[name].get("clock"))
        fitted = encoder.fit(examples, own_task, config.max_new_tokens, say)
        check_policy(model, encoder, own_task, fitted, config.max_new_tokens, name)
        answers[name] = answer_rows(
            model, encoder, own_task, fitted, config.max_new_tokens, config.batch_size, autocast
        )
    results = compare(task, examples, answers, config.seed)
    say(f"\n{task.name}, {len(examples)} rows, greedy answers\n{table(task, results)}")
    if config.output_dir:
        write_results(Path(config.output_dir), results, examples, answers)


def write_results(directory, results, examples, answers):
    """evaluate.json and, per model, answers-<n>.jsonl with a line per row."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "evaluate.json", results)
        for n, (name, given) in enumerate(answers.items()):
            with open(directory / f"answers-{n}.jsonl", "w", encoding="utf-8") as file:
                for example, answer in zip(examples, given):
                    row = {"model": name, "id": example.id, "gold": example.label, "label": answer.label}
                    file.write(json.dumps(row | {"answer": answer.text, "truncated": answer.truncated}) + "\n")
    except OSError as error:
        raise InputError(f"--output_dir {directory}: cannot be written: {error.strerror or error}") from None
    say(f"written to {directory}")


if __name__ == "__main__":
    main()
