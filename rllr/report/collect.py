"""What runs left in their directories, as the report page shows it. Reads files alone; no model is loaded."""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from ..common.errors import InputError
from ..common.files import METRICS, RECORD, RUN, path_from_record, read_json
from ..guard import paired
from ..metrics import CORRELATIONS, wilson_interval
from .fields import COUNT, LIST, NUMBER, OBJECT, OR_NULL, TEXT, YES_OR_NO, check_fields, read_lines
from .looks import FOLDER as LOOKS
from .looks import MOST_ROWS
from .trail_format import FOLDER as AUDIT
from .trail_format import Trail, read_trail, rollouts_in, step_of

LOOK = {  # what a line of a look holds
    "id": TEXT, "prompt": TEXT, "gold": TEXT + OR_NULL, "answer": TEXT, "label": TEXT + OR_NULL, "truncated": YES_OR_NO,
    **dict.fromkeys(("right", "score"), NUMBER),
    **dict.fromkeys(("label_score", "rationale_score", "grounded"), NUMBER + OR_NULL),
}  # fmt: skip
# What a record holds of what a page shows, as far as it has it.
RECORDED = {"task": OBJECT, "step": COUNT, "hacking": LIST, "report": OBJECT, "promise": TEXT + OR_NULL,
            "handed_back": TEXT}  # fmt: skip
RESULT = {"model": TEXT, "rows": COUNT, "metric": TEXT, "interval": LIST, "parse_failures": NUMBER}  # of an evaluation
CLOSENESS = "closeness to the gold label"  # what single answers are compared by where the metric is a correlation
EVALUATION = "evaluation"  # the directory beside runs where `make demo` and the README's commands put theirs


@dataclass
class FoundRun:
    """One run of train_sft.py, train_rm.py or train_ppo.py."""

    name: str  # for people: the end of its path that tells it from the others
    directory: Path
    stage: str  # sft, rm, ppo
    config: dict
    metrics: list  # of the dicts of metrics.jsonl
    record: dict = field(default_factory=dict)  # of the model that it hands back; empty while it runs
    hacked: list = field(default_factory=list)  # steps at which the guard of a PPO run saw reward hacking
    preview: dict | None = None  # of PPO's label reward model, or of a reward model's own record
    looks: dict = field(default_factory=dict)  # {step: rows of `looks`}, PPO alone
    trails: list = field(default_factory=list)  # files of the audit trail, in order

    @property
    def metric(self):
        """The task's metric."""
        return self.record.get("task", {}).get("metric", "accuracy")

    @property
    def last_step(self):
        return max((line["step"] for line in self.metrics), default=0)

    @property
    def is_running(self):
        """Whether a PPO run has steps before it."""
        return self.stage == "ppo" and self.last_step < (self.config.get("steps") or 0)

    @property
    def handed_back(self):
        """The step of the policy that PPO hands back; None where there is no such record."""
        return self.record.get("step") if self.stage == "ppo" else None


def find_runs(paths) -> list[FoundRun]:
    """The runs of some directories; of a directory that is no run, those in it. InputError where there is none."""
    found: dict[Path, FoundRun] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise InputError(f"{path}: no such directory; give the directory of a run, or one that holds runs")
        inside = [path] if (path / RUN).is_file() else sorted(p.parent for p in path.glob(f"*/{RUN}"))
        if not inside:
            raise InputError(f"{path}: holds no {RUN}, and no directory in it does; give the directory of a run")
        for directory in inside:
            found.setdefault(directory.resolve(), read_run(directory))
    runs = sorted(found.values(), key=lambda run: ("ppo", "rm", "sft").index(run.stage))
    home = Path(os.path.commonpath([path.parent if len(runs) > 1 else path.parent.parent for path in found]))
    for run in runs:
        run.name = run.directory.resolve().relative_to(home).as_posix()
    return runs


def read_run(directory) -> FoundRun:
    """A run from its files. InputError where run.json is none of ours."""
    written = read_json(directory / RUN)
    if not isinstance(written, dict) or written.get("stage") not in ("sft", "rm", "ppo"):
        raise InputError(f"{directory / RUN}: is not the record of a run")
    stage, config = written["stage"], written.get("config")
    config = {} if config is None else config
    shown: dict = dict.fromkeys(("reward", "label_rm", "threshold", "score_norm"), TEXT + OR_NULL)
    shown["steps"] = COUNT + OR_NULL
    check_fields(config, shown, f"{directory / RUN}: its config", optional=True)
    run = FoundRun(str(directory), directory, stage, config, read_lines(directory / METRICS, {"step": COUNT}))
    run.record = record_in(directory / "best" if stage == "ppo" else directory)
    if stage == "ppo":
        run.hacked = record_in(directory / "last").get("hacking") or []
        looks = [path for path in rollouts_in(directory / LOOKS) if step_of(path) <= run.last_step]
        run.looks = {step_of(path): read_lines(path, LOOK) for path in looks}
        run.trails = rollouts_in(directory / AUDIT)
    run.preview = preview_of(run)
    return run


def record_in(directory):
    """The record of a model as far as a page shows it; {} where there is none, or none yet."""
    path = Path(directory) / RECORD
    found = read_json(path) if path.is_file() else {}
    check_fields(found, RECORDED, str(path), optional=True)
    return found


def preview_of(run):
    """What train_rm.py wrote of PPO's prospects, in the record of the label reward model; None where there is none."""
    judge = run.directory if run.stage == "rm" else path_from_record(run.config.get("label_rm"), run.directory)
    found = record_in(judge).get("report", {}).get("preview") if judge is not None and run.stage != "sft" else None
    if found is not None:
        what = f"{Path(judge) / RECORD}: its preview"
        check_fields(found, {"greedy": NUMBER, "curve": LIST}, what)
        for point in found["curve"]:
            check_fields(point, {"n": COUNT, "kl": NUMBER, "accuracy": NUMBER}, what)
    return found if found and found["curve"] else None


def read_trails(run, most_tokens) -> tuple[list[Trail], int]:
    """(the rollouts of a run's audit trail, at most so many tokens of them, spread over the run; how many are left
    out). A single rollout is read in any case."""
    if not run.trails:
        return [], 0
    first = read_trail(run.trails[0])
    size = max(1, sum(map(len, first.tokens)))
    count = min(len(run.trails), max(1, most_tokens // size))
    chosen = [run.trails[round(i * (len(run.trails) - 1) / max(1, count - 1))] for i in range(count)]
    return [first, *map(read_trail, chosen[1:])], len(run.trails) - count


@dataclass
class Outcome:
    """Policies compared on the same rows. rows: per policy its name, value, interval, difference; answers: its pairs of
    (gold, label)."""

    of_what: str  # test rows that chose nothing, or dev
    metric: str
    rows: list
    answers: dict


def read_evaluation(directory) -> Outcome:
    """What rllr.evaluate wrote into a directory."""
    directory = Path(directory)
    path = directory / "evaluate.json"
    results = read_json(path)
    if not isinstance(results, list) or not results:
        raise InputError(f"{path}: is not what rllr.evaluate writes")
    for number, result in enumerate(results):
        what = f"{path}: model {number}"
        check_fields(result, RESULT, what)
        check_fields(result, {result["metric"]: NUMBER}, what)
        more = {"difference_interval": LIST, "difference": NUMBER, "part": TEXT, "grounded": NUMBER}
        check_fields(result, more, what, optional=True)
        for name in ("interval", "difference_interval")[: 1 + ("difference" in result)]:
            bounds = result.get(name) or ()
            check_fields(dict(enumerate(bounds)), {0: NUMBER, 1: NUMBER}, f"{what}: its {name}")
            if len(bounds) != 2:
                raise InputError(f"{what}: its {name} has {len(bounds)} numbers, not two")
    rows, answers = [], {}
    names = short_names([result["model"] for result in results])
    for number, result in enumerate(results):
        rows.append(
            {
                "name": names[number],
                "value": result[result["metric"]],
                "interval": result["interval"],
                "difference": result.get("difference"),
                "difference_interval": result.get("difference_interval"),
                "parse_failures": result["parse_failures"],
                "grounded": result.get("grounded"),
            }
        )
        lines = read_lines(directory / f"answers-{number}.jsonl", {"gold": TEXT + OR_NULL, "label": TEXT + OR_NULL})
        answers[names[number]] = [(line["gold"], line["label"]) for line in lines]
    met = any(result.get("rows_that_chose") or result.get("rows_that_trained") for result in results)
    what = "of which some trained or chose a policy: its figure is a little too good" if met else "which chose nothing"
    part = {"test": "test rows", "eval": "dev rows"}.get(results[0].get("part"), "rows")
    return Outcome(f"{results[0]['rows']:,} {part}, {what}", results[0]["metric"], rows, answers)


def short_names(paths):
    """Paths without the directories that they share."""
    try:
        shared = os.path.commonpath([os.path.dirname(path) for path in paths])
    except ValueError:  # some are absolute, others not
        return paths
    return [os.path.relpath(path, shared) if shared else path for path in paths]


def interval_of(values):
    """A 95 % interval of a mean: Wilson's where all are 0 or 1, else by the standard error, within 0 .. 1."""
    mean = sum(values) / len(values)
    if set(values) <= {0, 1}:
        return wilson_interval(mean, len(values))
    _, error = paired(values, [0.0] * len(values))
    return max(0.0, mean - 1.96 * error), min(1.0, mean + 1.96 * error)


def outcome_on_dev(run) -> Outcome | None:
    """The start, what PPO hands back and its last policy on dev, from its looks; None without them.

    The rows that the looks hold are compared, each with itself: right or wrong, or where the task's metric is a
    correlation, which no single row has, how close to the gold label.
    """
    if not run.looks.get(0):
        return None
    best, last = run.handed_back, max(run.looks)
    so_far = " so far" if run.is_running else ""
    steps = {f"SFT, the start, which is handed back{so_far}" if best == 0 else "SFT, the start": 0}
    steps |= {"handed back": best} if best else {}
    steps |= {"last": last} if last not in (0, best) else {}
    rows, answers = [], {}
    start = run.looks[0]
    for name, step in steps.items():
        look = run.looks.get(step)
        if not look or len(look) != len(start):
            continue
        right = [row["right"] for row in look]
        difference, between = paired(right, [row["right"] for row in start])
        told = step and math.isfinite(between)
        known = [row["grounded"] for row in look if row["grounded"] is not None]
        rows.append(
            {
                "name": name if name.startswith("SFT") else f"{name} (step {step})",
                "value": sum(right) / len(right),
                "interval": interval_of(right),
                "difference": difference if told else None,
                "difference_interval": (difference - 1.96 * between, difference + 1.96 * between) if told else None,
                "parse_failures": sum(row["label"] is None for row in look) / len(look),
                "grounded": sum(known) / len(known) if known else None,
            }
        )
        answers[rows[-1]["name"]] = [(row["gold"], row["label"]) for row in look]
    what = f"{'the first ' if len(start) == MOST_ROWS else ''}{len(start):,} dev rows"
    what += "; dev chose the step, so its figure is a little too good" if best else ""
    return Outcome(what, CLOSENESS if run.metric in CORRELATIONS else "accuracy", rows, answers)
