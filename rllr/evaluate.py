"""Label accuracy before and after: greedy answers, metrics with intervals, models compared on the same rows.

    python -m rllr.evaluate --task sst2 --eval_file dev.jsonl --models runs/sst2/sft runs/sst2/ppo-label

The rows are the test rows of the first model's record, or those that a flag names; where they trained or chose a
model, a line beside the table says so. Of a PPO run's directory the policy that it hands back is taken,
runs/sst2/ppo-label/best. Prints the table and writes, with --output_dir, evaluate.json and one answers-*.jsonl per
model.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .answers import answer_rows
from .best_of import BestOfConfig, best_answers, load_chooser
from .common.config import flag, parse_config
from .common.errors import InputError, command
from .common.files import write_json
from .common.log import say
from .data.encoding import Encoder
from .data.inherited import inherit
from .data.met_rows import met_rows
from .data.splits import DataConfig, load_evaluation
from .metrics import _columns, _metrics, _Statistic, answer_metrics, bootstrap_interval, grounded_words, mcnemar
from .model.loading import allow_remote_code, load_policy, load_tokenizer
from .model.records import check_same_task, policy_directory, read_record, resolve_task, task_of_record
from .model.trial import check_policy
from .run.machine import set_up
from .run.settings import DecodingConfig

# ---- metrics ---------------------------------------------------------------------------------------------------------


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
        row = {"model": name, "rows": size, "metric": task.metric, **answer_metrics(task, examples, answers)}
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


# ---- for people ------------------------------------------------------------------------------------------------------


def show_samples(task, examples, answers, count):
    """The first `count` rows: prompt, answer, parsed and gold label."""
    for example, answer in list(zip(examples, answers))[:count]:
        say(f"  prompt  {task.prompt_of(example)!r}")
        say(f"  answer  {answer.text!r}")
        say(f"  label   {answer.label or 'parse failure'} (gold: {example.label})\n")


def table(task, results) -> str:
    """The comparison as aligned text."""
    percent = task.metric in ("accuracy", "macro_f1")
    scale, unit = (100, " %") if percent else (1, "")
    digits = 1 if percent else 3
    width = max(len("model"), *(len(row["model"]) for row in results))
    grounded = [grounded_words(row) if "grounded" in row else "-" for row in results]
    wide = max(len("grounded"), *map(len, grounded))
    with_rationales = set(grounded) != {"-"}
    title = f"{'model':{width}}  {task.metric:>10}  {'95 % interval':>16}  {'parse fail.':>11}"
    lines = [title + (f"  {'grounded':>{wide}}" if with_rationales else "") + "  difference to the first"]
    for row, shown in zip(results, grounded, strict=True):
        low, high = (scale * v for v in row["interval"])
        line = f"{row['model']:{width}}  {scale * row[task.metric]:>{10 - len(unit)}.{digits}f}{unit}"
        line += f"  {f'{low:.{digits}f} .. {high:.{digits}f}':>16}  {100 * row['parse_failures']:>9.1f} %"
        if with_rationales:
            line += f"  {shown:>{wide}}"
        if "difference" in row:
            low, high = (scale * v for v in row["difference_interval"])
            line += f"  {scale * row['difference']:+.{digits}f} ({low:+.{digits}f} .. {high:+.{digits}f})"
            line += f", McNemar p {row['mcnemar_p']:.2g}"
        lines.append(line)
    return "\n".join(lines)


def tell_met(met, size, remedy):
    """Say of each model whose rows these are not quite new to: met is {model: `met_rows`}, of `size` rows."""
    for name, says in (
        ("rows_that_trained", "trained {}: what is measured on them says little about new texts"),
        ("rows_that_chose", "chose {} (they are dev or held-out rows of it): its figure is a little too good"),
    ):
        for count in sorted({found[name] for found in met.values()} - {0}):
            models = ", ".join(model for model, found in met.items() if found[name] == count)
            say(f"warning: {count} of these {size} rows {says.format(models)}; {remedy}")


def tell_ppo_run(name, record):
    """Of a policy that a PPO run hands back: what its reward model had promised on dev, and what the run made of it."""
    if "handed_back" not in record:
        return
    promise = record.get("promise")
    say(f"{name}:" + (f"\n  before PPO: {promise}" if promise else "") + f"\n  after PPO: {record['handed_back']}")


@dataclass
class Config(DecodingConfig, BestOfConfig, DataConfig):
    GROUP = "evaluation"
    models: list | None = flag(
        None,
        "directories (of a PPO run: its best policy) or hub names; the first is the one the others are compared with",
    )
    base: str | None = flag(None, "where the base of --models that are adapters lies now, if it has moved")
    output_dir: str | None = flag(None, "where evaluate.json and the answers go; without it they are only printed")
    overwrite: bool = flag(False, "replace an evaluation that is already there")
    part: str | None = flag(
        None, "eval (dev) or test; without it test where the policy's record names test rows", choices=("eval", "test")
    )
    seed: int = flag(0, "of the bootstrap, and of the sampled answers")


def choose_part(config, record):
    """--part; without it what the flags name, else the test rows of the policy's record, else dev."""
    if config.part or config.given & {"test_file", "test_split"}:
        return config.part or "test"
    named = config.given & {"eval_file", "eval_split", "dataset"}
    return "test" if "test" in record.get("rows", {}) and not named else "eval"


@command
def main(argv=None):
    config = parse_config(Config, argv, __doc__)
    allow_remote_code(config.trust_remote_code)
    if not config.models:
        raise InputError("--models: give one or more model directories")
    if config.output_dir and (Path(config.output_dir) / "evaluate.json").exists() and not config.overwrite:
        raise InputError(f"--output_dir {config.output_dir}: already holds an evaluation; give another or --overwrite")
    config.models = [policy_directory(name, say) for name in config.models]
    records = {name: read_record(name) for name in config.models}
    first = records[config.models[0]]
    task = resolve_task(config, first, config.models[0])
    inherit(config, first, config.models[0])
    device = set_up(config.precision, config.seed)
    tokenizers = {
        name: load_tokenizer(name) for name in config.models
    }  # a missing one is found before any model answers
    for name, record in records.items():
        check_same_task(record, task, f"--models {name}")
    chooser = load_chooser(config, task, tokenizers.values(), device)
    config.policy = config.models[0]
    part = choose_part(config, first)
    examples = load_evaluation(config, task, part, say, first)
    answers, met = {}, {}
    for name in config.models:
        own_task = task_of_record(records[name]) or task  # a label-only model is asked in its own way
        model = load_policy(name, device=device, base=config.base)
        encoder = Encoder(tokenizers[name], model, records[name].get("clock"))
        limits = {"max_new_tokens": config.max_new_tokens}
        fitted = encoder.fit(examples, own_task, config.max_new_tokens, say)
        check_policy(model, encoder, own_task, fitted, name=name, alike=[chooser] if chooser else (), **limits)
        answers[name] = answer_rows(model, encoder, own_task, fitted, batch_size=config.batch_size, **limits)
        met[name] = met_rows([name], examples)
        if chooser:
            best = f"{name} best of {config.best_of}"
            answers[best] = best_answers(chooser, model, encoder, own_task, fitted, config)
            met[best] = met_rows([name, config.label_rm], examples)
    results = compare(task, examples, answers, config.seed)
    results = [row | {"part": part} | met[row["model"]] for row in results]
    how = f"greedy answers, and the best of {config.best_of} by {config.label_rm}" if chooser else "greedy answers"
    say(f"\n{task.name}, {len(examples)} rows (part {part}), {how}\n{table(task, results)}")
    has_test = part == "eval" and "test" in first.get("rows", {})
    remedy = "use --part test" if has_test else "give rows that did neither as --test_file"
    own = {name: met[name.removesuffix(f" best of {config.best_of}")] for name in met}
    told = {name: found for name, found in met.items() if name in config.models or found != own[name]}
    tell_met(told, len(examples), remedy)
    for name, record in records.items():
        tell_ppo_run(name, record)
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
