"""What runs left in their directories, as the report page shows it. Reads files alone; no model is loaded."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from ..common.errors import InputError
from ..common.files import METRICS, RECORD, RUN, path_from_record, read_json
from ..guard import paired
from .looks import FOLDER as LOOKS
from .trail_format import FOLDER as AUDIT
from .trail_format import Trail, files_in, read_trail, step_of

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
    stage, config = written["stage"], written.get("config") or {}
    run = FoundRun(str(directory), directory, stage, config, read_lines(directory / METRICS))
    kept = directory / "best" / RECORD if stage == "ppo" else directory / RECORD
    run.record = read_json(kept) if kept.is_file() else {}
    if stage == "ppo":
        ended = directory / "last" / RECORD
        run.hacked = read_json(ended).get("hacking") or [] if ended.is_file() else []
        last = max((line["step"] for line in run.metrics), default=0)
        looks = {step_of(path): path for path in (directory / LOOKS).glob("step-*.jsonl")}
        run.looks = {step: read_lines(path) for step, path in sorted(looks.items()) if step <= last}
        run.trails = files_in(directory) if any((directory / AUDIT).glob("step-*.jsonl")) else []
    run.preview = preview_of(run)
    return run


def preview_of(run):
    """What train_rm.py wrote of PPO's prospects, in the record of the label reward model; None where there is none."""
    if run.stage == "rm":
        return run.record.get("report", {}).get("preview")
    judge = path_from_record(run.config.get("label_rm"), run.directory)
    if run.stage != "ppo" or judge is None or not (Path(judge) / RECORD).is_file():
        return None
    return read_json(Path(judge) / RECORD).get("report", {}).get("preview")


def read_lines(path) -> list[dict]:
    """The objects of a JSONL file, without a last line that is not whole: its run may be writing it."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    found = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise InputError(f"{path}, line {number}: not valid JSON: {error}") from None
    return found


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
    results = read_json(directory / "evaluate.json")
    if not isinstance(results, list) or not all(isinstance(row, dict) and "model" in row for row in results):
        raise InputError(f"{directory / 'evaluate.json'}: is not what rllr.evaluate writes")
    metric = results[0].get("metric", "accuracy")
    rows, answers = [], {}
    names = short_names([result["model"] for result in results])
    for number, result in enumerate(results):
        rows.append(
            {
                "name": names[number],
                "value": result[metric],
                "interval": result["interval"],
                "difference": result.get("difference"),
                "difference_interval": result.get("difference_interval"),
                "parse_failures": result["parse_failures"],
                "grounded": result.get("grounded"),
            }
        )
        lines = read_lines(directory / f"answers-{number}.jsonl")
        answers[names[number]] = [(line["gold"], line["label"]) for line in lines]
    part = {"test": "test rows, which chose nothing"}.get(results[0].get("part"), "dev rows, which chose the step")
    return Outcome(f"{results[0]['rows']:,} {part}", metric, rows, answers)


def short_names(paths):
    """Paths without the directories that they share."""
    try:
        shared = os.path.commonpath([os.path.dirname(path) for path in paths])
    except ValueError:  # some are absolute, others not
        return paths
    return [os.path.relpath(path, shared) if shared else path for path in paths]


def outcome_on_dev(run) -> Outcome | None:
    """The start, what PPO hands back and its last policy on dev, from its looks; None without them."""
    if 0 not in run.looks:
        return None
    best, last = run.handed_back, max(run.looks)
    steps = {"SFT, the start, which is handed back" if best == 0 else "SFT, the start": 0}
    steps |= {"handed back": best} if best else {}
    steps |= {"last": last} if last not in (0, best) else {}
    rows, answers = [], {}
    start = run.looks.get(0)
    for name, step in steps.items():
        look = run.looks.get(step)
        if look is None or start is None:
            continue
        right = [row["right"] for row in look]
        value, error = paired(right, [0.0] * len(right))
        difference, between = paired(right, [row["right"] for row in start])
        known = [row["grounded"] for row in look if row["grounded"] is not None]
        rows.append(
            {
                "name": name if name.startswith("SFT") else f"{name} (step {step})",
                "value": value,
                "interval": (value - 1.96 * error, value + 1.96 * error),
                "difference": difference if step else None,
                "difference_interval": (difference - 1.96 * between, difference + 1.96 * between) if step else None,
                "parse_failures": sum(row["label"] is None for row in look) / len(look),
                "grounded": sum(known) / len(known) if known else None,
            }
        )
        answers[rows[-1]["name"]] = [(row["gold"], row["label"]) for row in look]
    what = f"{len(start or ()):,} dev rows, which chose the step: its figure is a little too good"
    return Outcome(what, "accuracy", rows, answers)
